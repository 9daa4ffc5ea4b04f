"""Reads samples by position into batches: training micro-batches in the order's sequence, and evaluation batches.

Workers are stateless: the sampler hands out (epoch, position), so their number cannot change what is read.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nc_dist.data.augment import AugmentSpec, InputSpec, evaluation, keyed_random
from nc_dist.data.order import Order, eval_steps
from nc_dist.data.source import Source
from nc_dist.world import World


@dataclass(frozen=True)
class Batch:
    """Images (V*B, 3, S, S) uint8, all first views before all second ones; labels (B,) and positions (B,) int64."""

    images: Tensor
    labels: Tensor
    positions: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.images.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.positions,
        )


@dataclass(frozen=True)
class _Samples(Dataset[tuple[Tensor, int, int]]):
    """(epoch, position) -> views (V, 3, S, S) uint8, label, position; epoch < 0 is the evaluation transform."""

    source: Source
    input: InputSpec
    augment: AugmentSpec | None
    views: int
    seed: int

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, position = index
        image = self.source.read(position)
        if self.augment is None:
            views = [evaluation(image, self.input)]
        else:
            draws = (keyed_random(self.seed, epoch, position, view) for view in range(self.views))
            views = [self.augment.apply(image, self.input, random) for random in draws]
        return torch.stack(views), int(self.source.labels[position]), position


def _collate(samples: Sequence[tuple[Tensor, int, int]], input: InputSpec) -> Batch:
    if not samples:
        empty = torch.zeros(0, dtype=torch.int64)
        return Batch(torch.zeros(0, 3, input.size, input.size, dtype=torch.uint8), empty, empty)
    views, labels, positions = zip(*samples, strict=True)
    images = torch.stack(views, dim=1).flatten(0, 1)
    return Batch(images, torch.tensor(labels), torch.tensor(positions))


def _loader(samples: _Samples, index_batches: Iterable[list[tuple[int, int]]], workers: int) -> Iterator[Batch]:
    if workers == 0:
        return (_collate([samples[i] for i in indices], samples.input) for indices in index_batches)
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload([__name__])  # torch is imported once, not by each worker: 0.2 s instead of 5
    return iter(
        DataLoader(
            samples,
            batch_sampler=index_batches,
            num_workers=workers,
            collate_fn=partial(_collate, input=samples.input),
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=forkserver,
        )
    )


def train_steps_data(
    source: Source,
    positions: np.ndarray,
    order: Order,
    input: InputSpec,
    augment: AugmentSpec,
    *,
    views: int,
    steps: range,
    world: World,
    workers: int,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each step in `steps` (counted over the whole run).

    `positions[i]` is the source position of the order's sample i, so that a hold-out can be left out of the order.
    """

    def index_batches() -> Iterator[list[tuple[int, int]]]:
        for step in steps:
            epoch, within = divmod(step, order.steps_per_epoch)
            for row in order.rank_step(epoch, within, world.rank, world.size):
                yield [(epoch, int(position)) for position in positions[row]]

    samples = _Samples(source, input, augment, views, order.seed)
    batches = _loader(samples, index_batches(), workers)
    per_step = order.micro_per_step // world.size
    for _ in steps:
        yield [batch.to(world.device) for batch in islice(batches, per_step)]


def eval_batches(
    source: Source, positions: np.ndarray, input: InputSpec, batch: int, world: World, workers: int = 0
) -> Iterator[Batch]:
    """This rank's part of `positions` with the evaluation transform: each sample once over all ranks, equal counts."""
    index_batches = [
        [(-1, int(position)) for position in part] for part in eval_steps(positions, batch, world.rank, world.size)
    ]
    samples = _Samples(source, input, None, 1, 0)
    for loaded in _loader(samples, index_batches, workers):
        yield loaded.to(world.device)


def kept_shard_sizes(source: Source, positions: np.ndarray) -> tuple[int, ...]:
    """How many of the sorted `positions` lie in each shard of the source; empty shards are left out."""
    ends = np.cumsum(source.shard_sizes)
    counts = np.bincount(np.searchsorted(ends, positions, side="right"), minlength=len(ends))
    return tuple(counts[counts > 0].tolist())
