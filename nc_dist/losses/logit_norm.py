"""Cross-entropy of logits of one length."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nc_dist.losses.term import Loss
from nc_dist.outputs import Outputs


class LogitNorm(Loss):
    """Cross-entropy of z / (temperature |z|), z the logits (Wei et al. 2022, arXiv 2205.09310; Kornblith et al. 2021,
    arXiv 2010.16402, as "logit normalization", who use 0.04 as well)."""

    kind: Literal["logit_norm"] = "logit_norm"
    temperature: float = Field(0.04, gt=0)

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        # The smallest length bounds the gradient of logits that are all 0.
        return F.cross_entropy(F.normalize(outputs.logits, dim=1, eps=1e-7) / self.temperature, targets)
