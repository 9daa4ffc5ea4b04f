"""What a run minimises: a loss, regularisers added to it, and how a batch becomes inputs and targets. For the loop.

Letters: B samples of a micro-batch, V views, M micro-batches of a step over all ranks, K classes, T terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nc_dist.adversary import AdversarySpec, NoAdversary
from nc_dist.data.augment import InputSpec
from nc_dist.data.mix import MixSpec, NoMix, check_mix
from nc_dist.losses import LossSpec, RegulariserSpec
from nc_dist.optim import Schedule
from nc_dist.outputs import Outputs


@dataclass(frozen=True)
class Objective:
    """The same on every rank."""

    loss: LossSpec
    input: InputSpec
    micro_per_step: int  # M
    seed: int
    peak_lr: float
    schedule: Schedule
    steps: int  # of the whole run
    mix: MixSpec = NoMix()
    regularisers: tuple[RegulariserSpec, ...] = ()
    adversary: AdversarySpec = NoAdversary()

    def __post_init__(self) -> None:
        for term in (self.loss, *self.regularisers):
            check_mix(self.mix, term)

    @property
    def coupled(self) -> bool:
        """Whether a term sees the gathered global batch."""
        return any(term.coupled for term in (self.loss, *self.regularisers))

    @property
    def names(self) -> list[str]:
        """Of the terms (T,), for logs: the loss's kind, then the regularisers'."""
        return [term.kind for term in (self.loss, *self.regularisers)]

    def value(self, outputs: Outputs, targets: Tensor, coupled: bool) -> tuple[Tensor, Tensor]:
        """Weighted sum of the terms that are (or are not) coupled, and each one's own value (T,), 0 for the others.

        Rows are view-major: all first views before all second ones.
        """
        total = outputs.embedding_BE.new_zeros(())
        parts = outputs.embedding_BE.new_zeros(1 + len(self.regularisers))
        if self.loss.coupled == coupled:
            total = self.loss(outputs, targets)
            parts[0] = total.detach()
        for i, term in enumerate(self.regularisers, 1):
            if term.coupled == coupled:
                views = zip(each_view(outputs, self.loss.views), targets.chunk(self.loss.views), strict=True)
                value = torch.stack([term(seen, labels) for seen, labels in views]).mean()
                total = total + term.weight * value
                parts[i] = value.detach()
        return total, parts


def each_view(outputs: Outputs, views: int) -> list[Outputs]:
    """The outputs of each view, of view-major rows."""
    parts = [[None] * views if part is None else list(part.chunk(views)) for part in outputs]
    return [Outputs(*rows) for rows in zip(*parts, strict=True)]


def view_major(rows: Tensor, micros: int, views: int) -> Tensor:
    """Rows of many micro-batches, each view-major in itself, (micros * V * B, ..), as one view-major batch."""
    if views == 1 or micros == 1:
        return rows
    return rows.reshape(micros, views, -1, *rows.shape[1:]).transpose(0, 1).flatten(0, 2)
