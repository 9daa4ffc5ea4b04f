"""A network's features at its places, batch by batch, of a fixed set of samples. For `collapse` and the journeys.

Letters: B batch, N samples of a source, n of them on this rank, D feature dimensions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nc_dist.data.augment import InputSpec, normalise
from nc_dist.data.damage import BadSamples
from nc_dist.data.source import Source
from nc_dist.data.stream import Batch, eval_batches
from nc_dist.data.subset import per_class, second_half
from nc_dist.outputs import Outputs, full
from nc_dist.world import World

Observe = Callable[[Tensor], tuple[Outputs, dict[str, Tensor]]]


@dataclass(frozen=True)
class Seen:
    """One batch after the forward: features (B, D) by place, labels and positions (B,), and whose logits were right."""

    features: dict[str, Tensor]
    labels: Tensor
    positions: Tensor
    right: Tensor | None  # (B,) bool


@dataclass(frozen=True, eq=False)
class Probe:
    """Samples that are measured: `positions` of a source. What is drawn among them depends on the seed alone."""

    source: Source
    positions: np.ndarray
    seed: int = 0

    @property
    def num_classes(self) -> int:
        return len(self.source.class_names)

    @cached_property
    def in_second(self) -> Tensor:
        """Who belongs to the second half of the samples: (N,) bool."""
        return torch.from_numpy(second_half(self.source.labels, self.seed, self.positions))

    def ranked(self, most: int) -> tuple[Tensor, int]:
        """Equally many samples of each class, at most `most`, for the numerical rank: (N,) bool, and how many."""
        counts = np.bincount(self.source.labels[self.positions])
        n = min(most, int(counts[counts > 0].min(initial=most)))
        chosen = torch.zeros(len(self.source.labels), dtype=torch.bool)
        chosen[per_class(self.source.labels, n, self.seed, self.positions, purpose="rank")] = n > 0
        return chosen, n


def forwarded(
    forward: Observe, batches: Iterable[Batch], input: InputSpec, dtype: torch.dtype, headless: bool = False
) -> Iterator[Seen]:
    """The batches through the network. Places are the named blocks, `before` the head and `after` it.

    Without a head both would be the same features: they are given once, as `after`.
    """
    for batch in batches:
        size = len(batch.labels)
        # Some nets cannot take an empty batch, which a rank has when the others still have a sample: it takes a blank.
        images = batch.images if size else batch.images.new_zeros(1, *batch.images.shape[1:])
        outputs, blocks = forward(normalise(images, input, dtype))
        places = {**blocks, **({} if headless else {"before": outputs.features_Bd}), "after": outputs.embedding_BE}
        logits = outputs.logits_BK
        right = None if logits is None else logits[:size].argmax(1) == batch.labels
        features = {place: feats[:size].detach() for place, feats in places.items()}
        yield Seen(features, batch.labels, batch.positions, right)


def passes_over(
    probe: Probe, forward: Observe, input: InputSpec, dtype: torch.dtype, batch: int, world: World, workers: int,
    headless: bool, bad: BadSamples | None = None,
) -> Callable[[], Iterator[Seen]]:  # fmt: skip
    """What begins a pass of this rank's part of the probe through the network."""

    def begin() -> Iterator[Seen]:
        loaded = eval_batches(probe.source, probe.positions, input, batch, world, workers, bad)
        return forwarded(forward, loaded, input, dtype, headless)

    return begin


def gathered_features(seen: Iterable[Seen], place: str) -> tuple[Tensor, Tensor]:
    """This rank's features (n, D), at least fp32, and labels (n,) of one place."""
    parts = [(full(batch.features[place]), batch.labels) for batch in seen]
    return torch.cat([feats for feats, _ in parts]), torch.cat([labels for _, labels in parts])
