"""Stochastic gradient descent with momentum."""

from typing import Literal

import torch
from pydantic import Field

from nc_dist.optim.groups import Group, Optim


class SGD(Optim):
    """SGD with (Nesterov) momentum."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    nesterov: bool = True

    def build(self, groups: list[Group], fused: bool = False) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            groups,
            self.lr,
            self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov and self.momentum > 0,
            fused=fused or None,
        )
