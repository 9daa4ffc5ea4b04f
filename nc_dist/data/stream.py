"""Reads samples by position into batches: training micro-batches in the order's sequence, and evaluation batches.

Workers are stateless: the sampler hands out (epoch, position), so their number cannot change what is read. Where a
sample's bytes are wrong, training reads the next sample that it may read, evaluation none; the batch tells of both.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import forkserver, resource_tracker

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nc_dist.data.augment import AugmentSpec, InputSpec, evaluation, keyed_random
from nc_dist.data.damage import BadSamples, Fault
from nc_dist.data.order import Order, eval_steps
from nc_dist.data.shards.prefetch import prefetching
from nc_dist.data.source import Source
from nc_dist.errors import BadSample, InputError
from nc_dist.world import World

LOOK_UP = 2.0  # seconds between a worker's looks after the process that it reads for
IN_A_ROW = 100  # damaged samples, after which the set is taken for broken


@dataclass(frozen=True)
class Batch:
    """Images (V*B, 3, S, S) uint8, all first views before all second ones; labels (B,) and positions (B,) int64."""

    images: Tensor
    labels: Tensor
    positions: Tensor
    faults: tuple[Fault, ...] = ()  # damaged samples that were met
    error: str | None = None  # why it could not be read at all

    def to(self, device: torch.device) -> Batch:
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return replace(self, images=images, labels=labels)

    def pin_memory(self) -> Batch:
        """Called by the loader, so that the copy to a GPU can go on beside the computation."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True)
class _Read:
    """One sample: its views, (3, S, S) uint8 each, none where it is damaged and nothing may stand in for it."""

    views: list[Tensor] | None
    label: int
    position: int
    faults: tuple[Fault, ...] = ()
    error: str | None = None


@dataclass(frozen=True, eq=False)
class _Samples(Dataset[_Read]):
    """(epoch, position) -> the sample, augmented for training; without `augment` with the evaluation transform."""

    source: Source
    input: InputSpec
    augment: AugmentSpec | None = None
    views: int = 1
    seed: int = 0
    stand_ins: np.ndarray | None = None  # sorted positions that may be read in place of damaged ones

    def __getitem__(self, index: tuple[int, int]) -> _Read:
        epoch, asked = index
        try:
            position, image, faults = self._readable(asked)
        except InputError as error:  # told by the process that asked: a worker's own would come with a traceback
            return _Read(None, -1, asked, error=str(error))
        if image is None:
            return _Read(None, -1, asked, faults)
        if self.augment is None:
            views = [evaluation(image, self.input, self.source.decoder)]
        else:
            draws = (keyed_random(self.seed, epoch, asked, view) for view in range(self.views))
            views = [self.augment.apply(image, self.input, random, self.source.decoder) for random in draws]
        return _Read(views, int(self.source.labels[position]), position, faults)

    def _readable(self, asked: int) -> tuple[int, Tensor | None, tuple[Fault, ...]]:
        """The sample asked for, or where it is damaged the next one that may stand in for it, and the faults met."""
        reasons: dict[int, str] = {}
        for position in self._candidates(asked):
            try:
                image = self.source.read(position)
                return position, image, tuple(Fault(bad, why, position) for bad, why in reasons.items())
            except BadSample as error:
                reasons[position] = str(error)
        if len(reasons) > 1:
            raise InputError(f"{reasons[asked]}; so are the {len(reasons) - 1} samples after it")
        return asked, None, (Fault(asked, reasons[asked], None),)

    def _candidates(self, asked: int) -> Iterator[int]:
        yield asked
        if self.stand_ins is not None:
            after = int(np.searchsorted(self.stand_ins, asked)) + 1
            for i in range(after, after + min(IN_A_ROW, len(self.stand_ins)) - 1):
                yield int(self.stand_ins[i % len(self.stand_ins)])


def _collate(reads: Sequence[_Read], input: InputSpec) -> Batch:
    error = next((read.error for read in reads if read.error), None)
    faults = tuple(fault for read in reads for fault in read.faults)
    whole = [(read.views, read.label, read.position) for read in reads if read.views is not None]
    if not whole:
        empty = torch.zeros(0, dtype=torch.int64)
        return Batch(torch.zeros(0, 3, input.size, input.size, dtype=torch.uint8), empty, empty, faults, error)
    samples, labels, positions = zip(*whole, strict=True)
    # Decoders leave the channels last in memory, and there they stay: the GPU wants them so, and nothing is transposed.
    pixels = torch.stack([image.permute(1, 2, 0) for view in zip(*samples, strict=True) for image in view])
    return Batch(pixels.permute(0, 3, 1, 2), torch.tensor(labels), torch.tensor(positions), faults, error)


def _loader(samples: _Samples, index_batches: Iterable[list[tuple[int, int]]], workers: int) -> Iterator[Batch]:
    """The batches in the order of their indices; InputError for a sample that could not be had."""
    loaded: Iterable[Batch]
    if workers == 0:
        loaded = (_collate([samples[i] for i in indices], samples.input) for indices in index_batches)
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # torch is imported once, not by each worker: 0.2 s instead of 5
        _start_forkserver()
        loaded = DataLoader(
            samples,
            batch_sampler=index_batches,
            num_workers=workers,
            collate_fn=partial(_collate, input=samples.input),
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=context,
            worker_init_fn=partial(_end_with, os.getpid()),
        )
    for batch in loaded:
        if batch.error:
            raise InputError(batch.error)
        yield batch


def _start_forkserver() -> None:
    """With signals blocked that ask a run to stop: sent to all of its processes, they are for those that train.

    Loader workers inherit this, and go on for the steps until everything is saved.
    """
    stops = {signal.SIGTERM, signal.SIGUSR1}
    held = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # the start of the tracker has unblocked SIGTERM
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _end_with(reader: int, worker: int) -> None:
    """Let a loader worker end when the process that it reads for is gone: it is the forkserver's child, not its own."""

    def watch() -> None:
        while True:
            try:
                os.kill(reader, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(LOOK_UP)

    threading.Thread(target=watch, daemon=True).start()


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

    `positions[i]` is the source position of the order's sample i, so that a hold-out can be left out of the order. A
    damaged sample gives way to the next of `positions`, in whichever rank or worker: `Batch.faults` tells.
    """

    def step_positions(order: Order, step: int) -> np.ndarray:
        """This rank's micro-batches of a step, (M/W, micro)."""
        found: np.ndarray = positions[order.rank_step(*divmod(step, order.steps_per_epoch), world.rank, world.size)]
        return found

    index_batches = (
        [(step // order.steps_per_epoch, position) for position in micro.tolist()]
        for step in steps
        for micro in step_positions(order, step)
    )
    samples = _Samples(source, input, augment, views, order.seed, stand_ins=positions)
    batches = _loader(samples, index_batches, workers)
    ahead = replace(order)  # another thread asks it: an order keeps the line of one epoch
    with prefetching(source, (step_positions(ahead, step) for step in steps)) as step_done:
        for _ in steps:
            yield [batch.to(world.device) for batch in islice(batches, order.micro_per_step // world.size)]
            step_done()


def eval_batches(
    source: Source,
    positions: np.ndarray,
    input: InputSpec,
    batch: int,
    world: World,
    workers: int = 0,
    bad: BadSamples | None = None,
) -> Iterator[Batch]:
    """This rank's part of `positions` with the evaluation transform: each sample once over all ranks, equal counts.

    Damaged samples are left out and counted in `bad`; without it the first one is an InputError.
    """
    index_batches = [
        [(-1, int(position)) for position in part] for part in eval_steps(positions, batch, world.rank, world.size)
    ]
    faults: list[Fault] = []
    for loaded in _loader(_Samples(source, input), index_batches, workers):
        faults += loaded.faults
        if faults and bad is None:
            raise InputError(faults[0].reason)
        yield loaded.to(world.device)
    if bad is not None:
        bad.add(source, faults, "evaluation")
