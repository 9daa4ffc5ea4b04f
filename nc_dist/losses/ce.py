"""Cross-entropy of the classifier's logits."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from nc_dist.losses.term import Loss
from nc_dist.outputs import Outputs


class CrossEntropy(Loss):
    """Mean over the batch of -log softmax(logits)[label]."""

    kind: Literal["ce"] = "ce"

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)
