"""What losses and regularisers have in common: terms of the objective, called as term(outputs, targets) -> scalar."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from nc_dist.outputs import Outputs
from nc_dist.spec import Spec


class Loss(Spec):
    """A mean over the batch. The class variables say what it wants; a subclass overrides those that differ.

    `targets` are labels (B,) int64, or class probabilities (B, K) of the logits' type where `soft` allows them.
    """

    uses_logits: ClassVar[bool] = True  # the model needs a classifier
    views: ClassVar[int] = 1  # augmented views of each image
    coupled: ClassVar[bool] = False  # samples meet inside it: it sees the gathered global batch, not micro-batches
    soft: ClassVar[bool] = True  # takes probabilities as targets, as mixup and cutmix make them

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        raise NotImplementedError


class Regulariser(Loss):
    """A term that is added to any loss, `weight` times; a negative weight rewards what a positive one penalises.

    Where a loss has several views, the regulariser sees one at a time: its value is the mean over views.
    """

    weight: float

    uses_logits: ClassVar[bool] = False


def probabilities(targets: Tensor, logits_BK: Tensor) -> Tensor:
    """Targets as probabilities (B, K) of the logits' type; labels become one-hot."""
    return targets if targets.ndim == 2 else F.one_hot(targets, logits_BK.shape[1]).to(logits_BK.dtype)
