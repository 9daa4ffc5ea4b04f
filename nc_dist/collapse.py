"""Neural collapse of a network's features at every place of it, exact over ranks, in one forward.

Used live by both training journeys and by `measure`. What needs the final class means takes a second pass, over
features that were kept (each rank keeps its own) or over a second forward when they would take too much memory.

Letters: B batch, N samples of a source, D feature dimensions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nc_dist.data.augment import InputSpec, normalise
from nc_dist.data.source import Source
from nc_dist.data.stream import Batch, eval_batches
from nc_dist.data.subset import per_class, second_half
from nc_dist.loop import full
from nc_dist.model import Outputs
from nc_dist.nc import Classifier, HalvedMoments, NotFinite, SecondPass, combined
from nc_dist.nc.metrics import LIVE, SLOW, class_ranks, nc1_about, summary
from nc_dist.nc.statistics import Moments, Statistics, Undefined
from nc_dist.world import World

ENDS = ("before", "after")
LEFT_OUT = {
    **dict.fromkeys(SLOW),
    "reasons": dict.fromkeys(SLOW, "slow, left out at a block: `nc-dist nc show` has it"),
}
CACHE_BYTES = 4e9  # of features that a rank keeps for the second pass, by default

Observe = Callable[[Tensor], tuple[Outputs, dict[str, Tensor]]]


@dataclass(frozen=True)
class Seen:
    """One batch after the forward: features (B, D) by place, labels and positions (B,), how many logits were right."""

    features: dict[str, Tensor]
    labels: Tensor
    positions: Tensor
    hits: int | None


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


@dataclass(frozen=True)
class Collapse:
    """What was found, the same on every rank: moments and metrics by place, and the accuracy of the logits."""

    moments: dict[str, HalvedMoments]
    metrics: dict[str, dict[str, Any]]
    acc1: float | None
    cached_bytes: int  # of features that this rank kept; 0: a second forward took their place

    def by_place(self, headless: bool) -> dict[str, Any]:
        """The metrics by place, and `acc1` where there is a classifier; without a head `before` is `after`."""
        same = {"before": self.metrics["after"]} if headless else {}
        accuracy = {} if self.acc1 is None else {"acc1": self.acc1}
        return {**self.metrics, **same, **accuracy}


def forwarded(
    forward: Observe, batches: Iterable[Batch], input: InputSpec, dtype: torch.dtype, headless: bool = False
) -> Iterator[Seen]:
    """The batches through the network. Places are the named blocks, `before` the head and `after` it.

    Without a head both would be the same features: they are given once, as `after`.
    """
    for batch in batches:
        outputs, blocks = forward(normalise(batch.images, input, dtype))
        places = {**blocks, **({} if headless else {"before": outputs.features_Bd}), "after": outputs.embedding_BE}
        logits = outputs.logits_BK
        hits = int((logits.argmax(1) == batch.labels).sum()) if logits is not None else None
        yield Seen({place: feats.detach() for place, feats in places.items()}, batch.labels, batch.positions, hits)


def passes_over(
    probe: Probe, forward: Observe, input: InputSpec, dtype: torch.dtype, batch: int, world: World, workers: int,
    headless: bool,
) -> Callable[[], Iterator[Seen]]:  # fmt: skip
    """What begins a pass of this rank's part of the probe through the network."""

    def begin() -> Iterator[Seen]:
        loaded = eval_batches(probe.source, probe.positions, input, batch, world, workers)
        return forwarded(forward, loaded, input, dtype, headless)

    return begin


def gathered_features(seen: Iterable[Seen], place: str) -> tuple[Tensor, Tensor]:
    """This rank's features (n, D), at least fp32, and labels (n,) of one place."""
    parts = [(full(batch.features[place]), batch.labels) for batch in seen]
    return torch.cat([feats for feats, _ in parts]), torch.cat([labels for _, labels in parts])


def collapse(
    forward_pass: Callable[[], Iterator[Seen]],
    probe: Probe,
    world: World,
    classifiers: Mapping[str, Classifier],
    *,
    only: Collection[str] | None = None,
    reference: Mapping[str, Moments] | None = None,
    rank_per_class: int = 0,
    cache_bytes: float = CACHE_BYTES,
) -> Collapse:
    """Every metric at every place, over all ranks; each of them must call it.

    `forward_pass` begins a pass over this rank's part of the probe. `classifiers` act on the features of their place.
    `only` names the moment metrics that are wanted; by default all of them before and after the head, and at the blocks
    all but the slow ones (nc.metrics.SLOW), which can be had of the moments later. `reference` holds other samples'
    moments: NC1 and nearest centres are given about their means besides. `rank_per_class` > 0 adds the numerical rank
    of so many samples a class. Raises NotFinite, on every rank, naming place and first sample.
    """
    first = _FirstPass(probe, world, rank_per_class, cache_bytes)
    for seen in forward_pass():
        first.add(seen)
    moments, right, total = first.finish()
    passes: dict[str, list[SecondPass]] = {}
    metrics: dict[str, dict[str, Any]] = {}
    for place, halved in moments.items():
        stats, classifier = halved.statistics(), classifiers.get(place)
        weight, bias = classifier or (None, None)
        metrics[place] = summary(stats, weight, bias, LIVE if only is None and place not in ENDS else only)
        if only is None and place not in ENDS:
            metrics[place] = combined(metrics[place], LEFT_OUT)
        passes[place] = [SecondPass(stats, classifier)]
        if reference is not None and place in reference:
            values, about = _about(stats, reference[place].statistics())
            metrics[place] = combined(metrics[place], values)
            passes[place] += about
    for seen in forward_pass() if first.cache is None else first.cache:
        for place, feats in seen.features.items():
            for second in passes[place]:
                second.update(feats, seen.labels)
    for place, (own, *others) in passes.items():
        metrics[place] = combined(metrics[place], own.metrics(world.sum_))
        for second in others:
            metrics[place]["ncc_acc1_about_train"] = second.metrics(world.sum_)["ncc_acc1"]
        if rank_per_class:
            metrics[place] = combined(metrics[place], first.ranks(place))
    accuracy = right / total if classifiers and right is not None and total else None
    return Collapse(moments, metrics, accuracy, first.cached_bytes)


class _FirstPass:
    """What one pass over the features leaves on this rank."""

    def __init__(self, probe: Probe, world: World, rank_per_class: int, cache_bytes: float) -> None:
        self._probe, self._world, self._limit = probe, world, cache_bytes
        self._ranked, self._rank_n = probe.ranked(rank_per_class)
        self._moments: dict[str, HalvedMoments] = {}
        self._chosen: dict[str, list[Tensor]] = {}  # features for the numerical rank
        self._labels: list[Tensor] = []
        self._right: int | None = None
        self._fault: str | None = None
        self.cache: list[Seen] | None = []
        self.cached_bytes = 0

    def add(self, seen: Seen) -> None:
        if seen.hits is not None:
            self._right = (self._right or 0) + seen.hits
        half_B = self._probe.in_second[seen.positions].to(seen.labels.device)
        chosen_B = self._ranked[seen.positions].to(seen.labels.device)
        self._labels.append(seen.labels[chosen_B])
        for place, feats in seen.features.items():
            if place not in self._moments:
                # fp64 products: under a percent of a forward, and the same to 1e-12 however the samples are split.
                options = {"dtype": torch.float64, "device": feats.device}
                self._moments[place] = HalvedMoments(self._probe.num_classes, feats.shape[1], **options)
            try:
                self._moments[place].update(feats, seen.labels, half_B)
            except NotFinite as error:  # told at the end, by all ranks together
                sample = self._probe.source.name(int(seen.positions[error.row]))
                self._fault = self._fault or f"{place}: {error}; the sample is {sample}"
            self._chosen.setdefault(place, []).append(feats[chosen_B])
        self._keep(seen)

    def _keep(self, seen: Seen) -> None:
        """Cache the features, all of them or none."""
        if self.cache is None:
            return
        size = sum(feats.numel() * feats.element_size() for feats in seen.features.values())
        samples = -(-len(self._probe.positions) // self._world.size)
        if size / max(len(seen.labels), 1) * samples > self._limit:
            self.cache, self.cached_bytes = None, 0
        else:
            self.cache.append(seen)
            self.cached_bytes += size

    def finish(self) -> tuple[dict[str, HalvedMoments], int | None, int]:
        """Moments over all ranks, right logits and samples."""
        faults = [fault for fault in self._world.gather_objects(self._fault) if fault]
        if faults:
            raise NotFinite(faults[0], 0)
        if any(self._world.gather_objects(self.cache is None)):  # a second forward takes all ranks
            self.cache, self.cached_bytes = None, 0
        places = list(self._moments)
        moments = {place: self._moments.pop(place).all_reduce(self._world.sum_) for place in places}
        right = None if self._right is None else sum(self._world.gather_objects(self._right))
        return moments, right, len(self._probe.positions)

    def ranks(self, place: str) -> dict[str, Any]:
        """Numerical and stable rank of one place, over all ranks."""
        world = self._world
        return class_ranks(
            torch.cat(self._chosen[place]),
            torch.cat(self._labels),
            self._probe.num_classes,
            self._rank_n,
            exchange=world.exchange,
            sum_fn=world.sum_,
            rank=world.rank,
            size=world.size,
        )


def _about(stats: Statistics, reference: Statistics) -> tuple[dict[str, Any], list[SecondPass]]:
    """NC1 about the class means of others, and the second pass that looks for the nearest of them."""
    name = "nc1_test_about_train"
    try:
        return {name: nc1_about(stats, reference), "reasons": {}}, [SecondPass(reference)]
    except Undefined as why:
        return {name: None, "reasons": {name: str(why)}}, []
