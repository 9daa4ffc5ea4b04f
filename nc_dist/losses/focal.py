"""Focal loss: cross-entropy in which samples count the less, the better they are classified."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from nc_dist.losses.term import Loss, probabilities
from nc_dist.outputs import Outputs


class Focal(Loss):
    """Mean over the batch of sum_k t_k FL(p_k), FL(p) = -(1 - p)^gamma log p, p the softmax of the logits (Lin et al.
    2017, arXiv 1708.02002, eq. 4, without alpha). Of a label, that is FL of its own class."""

    kind: Literal["focal"] = "focal"
    gamma: float = Field(3.0, ge=0)

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        log_p_BK = outputs.logits.log_softmax(1)
        # Where p rounds to 1, a power below 1 would have an infinite slope.
        rest_BK = (-torch.expm1(log_p_BK)).clamp(min=torch.finfo(log_p_BK.dtype).tiny)
        return -(probabilities(targets, outputs.logits) * rest_BK**self.gamma * log_p_BK).sum(1).mean()
