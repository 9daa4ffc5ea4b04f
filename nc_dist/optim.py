"""Optimisers and learning-rate schedules as specs. `lr` is absolute: nobody rescales it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from nc_dist.spec import Spec


class SGD(Spec):
    """SGD with (Nesterov) momentum."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    nesterov: bool = True

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        nesterov = self.nesterov and self.momentum > 0
        return torch.optim.SGD(params, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=nesterov)


class AdamW(Spec):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.05, ge=0)

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, self.lr, self.betas, weight_decay=self.weight_decay)


OptimSpec = Annotated[SGD | AdamW, Field(discriminator="kind")]


class Schedule(Spec):
    """Learning rate over the run: linear warm-up, then cosine to zero, or constant."""

    kind: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)  # fraction of all steps

    def lr(self, peak: float, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        warmup_steps = round(self.warmup * steps)
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        if self.kind == "constant":
            return peak
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * done))
