"""Cross-entropy with a penalty on the length of the logits."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nc_dist.losses.term import Loss
from nc_dist.outputs import Outputs


class LogitPenalty(Loss):
    """Cross-entropy plus the mean over the batch of beta |z|^2 / 2, z the logits (Kornblith et al. 2021, arXiv
    2010.16402; the default is theirs for ImageNet)."""

    kind: Literal["logit_penalty"] = "logit_penalty"
    beta: float = Field(6e-4, ge=0)

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        penalty = outputs.logits.square().sum(1).mean() / 2
        return F.cross_entropy(outputs.logits, targets) + self.beta * penalty
