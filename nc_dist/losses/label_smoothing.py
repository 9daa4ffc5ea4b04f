"""Cross-entropy with smoothed labels."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nc_dist.losses.term import Loss
from nc_dist.outputs import Outputs


class LabelSmoothing(Loss):
    """Cross-entropy with the targets (1 - epsilon) t + epsilon / K (Szegedy et al. 2016, arXiv 1512.00567)."""

    kind: Literal["label_smoothing"] = "label_smoothing"
    epsilon: float = Field(0.1, ge=0, lt=1)

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets, label_smoothing=self.epsilon)
