"""Layer-wise adaptive rate scaling (LARS), for batches of thousands of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from nc_dist.optim.groups import Group, Optim


class LARS(Optim):
    """LARS (You et al. 2017, arXiv 1708.03888, algorithm 1). Norms and biases learn by the plain `lr`.

    It needs the norm of each parameter by itself, so ZeRO 1-3, which flatten all parameters into one, cannot have it.
    """

    kind: Literal["lars"] = "lars"
    lr: float = Field(2.0, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    trust: float = Field(1e-3, gt=0)  # eta of the paper

    def build(self, groups: list[Group], fused: bool = False) -> torch.optim.Optimizer:
        settings = {"momentum": self.momentum, "weight_decay": self.weight_decay, "trust": self.trust}
        return LayerwiseSGD(groups, {"lr": self.lr, **settings})


class LayerwiseSGD(torch.optim.Optimizer):
    """v <- momentum v + lr local (g + decay w);  w <- w - v.

    `local` = trust |w| / (|g| + decay |w|) of the parameter, and 1 for vectors (norms and biases) and where |w| or |g|
    is 0. As in the paper v holds the learning rate, so that a step taken at a high rate fades in its own time.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop computes the loss"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["velocity"] = torch.zeros_like(parameter)
                rate = group["lr"] * _local_rate(parameter, parameter.grad, group["weight_decay"], group["trust"])
                decayed = parameter.grad.add(parameter, alpha=group["weight_decay"])
                parameter -= state["velocity"].mul_(group["momentum"]).add_(decayed * rate)


def _local_rate(weight: Tensor, gradient: Tensor, decay: float, trust: float) -> Tensor | float:
    if weight.ndim <= 1:
        return 1.0
    w, g = weight.norm(), gradient.norm()
    return torch.where((w > 0) & (g > 0), trust * w / (g + decay * w), 1.0)
