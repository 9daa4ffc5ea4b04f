"""Class moments in two halves of the samples: what the split-half gap of NC1 is made of. Kept by all who measure.

Letters: B samples of a batch, K classes, D feature dimensions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nc_dist.nc.moments import ClassMoments, SumFn
from nc_dist.nc.statistics import Statistics


class HalvedMoments:
    """As ClassMoments, of which it holds two; the whole is their exact merge."""

    def __init__(self, num_classes: int, dim: int, **options: Any) -> None:
        self.first, self.second = (ClassMoments(num_classes, dim, **options) for _ in range(2))

    @classmethod
    def of(cls, first: ClassMoments, second: ClassMoments) -> HalvedMoments:
        """These two halves."""
        halved = cls.__new__(cls)
        halved.first, halved.second = first, second
        return halved

    def update(self, feats_BD: Tensor, labels_B: Tensor, in_second_B: Tensor | None = None) -> None:
        """Add a batch; `in_second_B` says who belongs to the second half, by default every other sample of a class.

        Errors are those of ClassMoments, with nothing added.
        """
        self.first.check(feats_BD, labels_B)
        labels_B = labels_B.long()
        if in_second_B is None:
            seen_K = (self.first.n_K + self.second.n_K).long()
            in_second_B = (seen_K[labels_B] + occurrence(labels_B)) % 2 == 1
        for half, rows in ((self.first, (~in_second_B)), (self.second, in_second_B)):
            half.update(feats_BD[rows], labels_B[rows])

    def whole(self) -> ClassMoments:
        """All samples."""
        return self.first.merge(self.second)

    def statistics(self) -> Statistics:
        """Those of all samples, with the halves beside them."""
        return replace(self.whole().statistics(), halves=(self.first, self.second))

    def merge(self, other: HalvedMoments) -> HalvedMoments:
        """Both sets of samples, half by half; neither is changed."""
        return HalvedMoments.of(self.first.merge(other.first), self.second.merge(other.second))

    def to(self, device: torch.device | str) -> HalvedMoments:
        """A copy on the device."""
        first, second = (
            ClassMoments.from_state_dict({name: tensor.to(device) for name, tensor in half.state_dict().items()})
            for half in (self.first, self.second)
        )
        return HalvedMoments.of(first, second)

    def all_reduce(self, sum_fn: SumFn) -> HalvedMoments:
        """Over all ranks, equal on each; every rank must call it."""
        return HalvedMoments.of(self.first.all_reduce(sum_fn), self.second.all_reduce(sum_fn))


def occurrence(labels_B: Tensor) -> Tensor:
    """How many earlier samples have the same label: (B,) int64."""
    order = labels_B.argsort(stable=True)
    in_order = labels_B[order]
    rows = torch.arange(len(labels_B), device=labels_B.device)
    starts = torch.ones_like(in_order, dtype=torch.bool)
    starts[1:] = in_order[1:] != in_order[:-1]
    first = torch.where(starts, rows, 0).cummax(0).values if len(rows) else rows
    return torch.empty_like(rows).index_put((order,), rows - first)
