"""What a run minimises: a loss, regularisers added to it, and how a batch becomes inputs and targets. For the loop.

Letters: B samples of a micro-batch, V views, M micro-batches of a step over all ranks, K classes, T numbers for logs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nc_dist.adversary import AdversarySpec, NoAdversary
from nc_dist.data.augment import InputSpec
from nc_dist.data.mix import MixSpec, NoMix, check_mix
from nc_dist.losses import Loss, LossSpec, RegulariserSpec
from nc_dist.losses.term import alone
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
        for term in self.terms:
            check_mix(self.mix, term)

    @property
    def terms(self) -> tuple[Loss, ...]:
        """The loss, then the regularisers."""
        return (self.loss, *self.regularisers)

    @property
    def coupled(self) -> bool:
        """Whether a term sees the gathered global batch."""
        return any_coupled(self.terms)

    @property
    def names(self) -> list[str]:
        """Of the numbers for logs (T,): the terms' values, and how many samples are left out of a term's mean."""
        return [term.kind for term in self.terms] + [f"{term.kind}_left_out" for term in self.terms if term.paired]

    def value(self, outputs: Outputs, targets: Tensor, coupled: bool) -> tuple[Tensor, Tensor]:
        """Weighted sum of the terms that are (or are not) coupled, and the numbers for logs (T,), 0 for other terms.

        Rows are view-major: all first views before all second ones.
        """
        total = zero = outputs.embedding_BE.new_zeros(())
        views = list(zip(each_view(outputs, self.loss.views), targets.chunk(self.loss.views), strict=True))
        weighted = [(self.loss, 1.0, [(outputs, targets)]), *((term, term.weight, views) for term in self.regularisers)]
        values, left_out = [], []
        for term, weight, parts in weighted:
            seen = parts if term.coupled == coupled else []
            value = torch.stack([term(*part) for part in seen]).mean() if seen else zero
            total = total + weight * value
            values.append(value.detach())
            if term.paired:
                left_out.append(zero + sum(alone(labels) for _, labels in seen))
        return total, torch.stack(values + left_out)


def any_coupled(terms: Iterable[Loss]) -> bool:
    """Whether one of them sees the gathered global batch."""
    return any(term.coupled for term in terms)


def each_view(outputs: Outputs, views: int) -> list[Outputs]:
    """The outputs of each view, of view-major rows."""
    parts = [[None] * views if part is None else list(part.chunk(views)) for part in outputs]
    return [Outputs(*rows) for rows in zip(*parts, strict=True)]


def view_major(rows: Tensor, micros: int, views: int) -> Tensor:
    """Rows of many micro-batches, each view-major in itself, (micros * V * B, ..), as one view-major batch."""
    if views == 1 or micros == 1:
        return rows
    return rows.reshape(micros, views, -1, *rows.shape[1:]).transpose(0, 1).flatten(0, 2)
