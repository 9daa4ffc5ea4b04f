"""What losses and regularisers have in common: terms of the objective, called as term(outputs, targets) -> scalar."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from nc_dist.errors import InputError
from nc_dist.outputs import Outputs
from nc_dist.spec import Spec


class Loss(Spec):
    """A mean over the batch. What it wants is said below; a subclass overrides what differs.

    `targets` are labels (B,) int64, or class probabilities (B, K) of the logits' type where `soft` allows them.
    """

    kind: str

    uses_logits: ClassVar[bool] = True  # the model needs a classifier
    classifier: ClassVar[str | None] = None  # the kind it must be; None: any
    soft: ClassVar[bool] = True  # takes probabilities as targets, as mixup and cutmix make them
    least: ClassVar[int] = 1  # samples without which it has no value
    paired: ClassVar[bool] = False  # the only sample of its class is left out of its mean: counted by `alone`

    @property
    def views(self) -> int:
        """Augmented views of each image."""
        return 1

    @property
    def coupled(self) -> bool:
        """Whether samples meet inside it, so that it sees the gathered global batch, not micro-batches."""
        return False

    @property
    def named(self) -> str:
        """How a run names it, for messages."""
        return f"loss.kind={self.kind!r}"

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def labels(self, targets: Tensor) -> Tensor:
        """The targets of a term that is not `soft`, (B,); InputError where they are probabilities."""
        if targets.ndim != 1:
            raise InputError(
                f"{self.named}: compares samples by their label and takes no probabilities as targets; "
                "use data.mix.kind=none, or a term that takes them, such as loss.kind=ce"
            )
        return targets


class Regulariser(Loss):
    """A term that is added to any loss, `weight` times; a negative weight rewards what a positive one penalises.

    Where a loss has several views, the regulariser sees one at a time: its value is the mean over views.
    """

    weight: float

    uses_logits: ClassVar[bool] = False

    @property
    def named(self) -> str:
        return f"regularisers: kind={self.kind!r}"


def probabilities(targets: Tensor, logits_BK: Tensor) -> Tensor:
    """Targets as probabilities (B, K) of the logits' type; labels become one-hot."""
    return targets if targets.ndim == 2 else F.one_hot(targets, logits_BK.shape[1]).to(logits_BK.dtype)


def same_class(labels_B: Tensor) -> Tensor:
    """Whether two samples are of one class, (B, B) bool; each is of its own."""
    return labels_B[:, None] == labels_B[None, :]


def alone(labels_B: Tensor) -> Tensor:
    """How many samples are the only one of their class, ()."""
    return (same_class(labels_B).sum(1) == 1).sum()
