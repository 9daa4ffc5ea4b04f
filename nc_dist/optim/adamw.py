"""Adam with decoupled weight decay."""

from typing import Literal

import torch
from pydantic import Field

from nc_dist.optim.groups import Group, Optim


class AdamW(Optim):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.05, ge=0)

    def build(self, groups: list[Group], fused: bool = False) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, self.lr, self.betas, weight_decay=self.weight_decay, fused=fused or None)
