"""The training set of a pre-training run: what is trained on, what is held out, in which order. For `pretrain`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nc_dist.config import PretrainRun
from nc_dist.data.catalog import open_set
from nc_dist.data.catalog.published import open_or_published
from nc_dist.data.checks import check_classes
from nc_dist.data.order import Order, default_lanes
from nc_dist.data.source import Source, kept_shard_sizes
from nc_dist.data.stream import Batch, train_steps_data
from nc_dist.data.subset import split_off
from nc_dist.sample_log import logged
from nc_dist.world import World


@dataclass(frozen=True)
class SourceSet:
    """The training set of a run: what is trained on, what is held out, in which order."""

    source: Source
    train: np.ndarray  # positions
    heldout: np.ndarray
    order: Order
    steps: int  # of the whole run
    identity: str  # of the source
    about: dict[str, Any]  # what is stored of the set


def open_source_set(run: PretrainRun, published: bool = False) -> SourceSet:
    """Open and check everything about the data that can be wrong before training; InputError for what is.

    `published`: a catalogued set that is not at hand is taken as it was published, to be planned for.
    """
    opened = (open_or_published if published else open_set)(run.data.train, "train", run.data)
    source = opened.source
    check_classes(source, f"data.train={run.data.train!r}")
    train, heldout = split_off(source.labels, run.data.holdout_per_class, run.seed, purpose="data.holdout_per_class")
    lanes = run.data.lanes or default_lanes(run.batch.global_, run.batch.micro)
    sizes = kept_shard_sizes(source.shard_sizes, train)
    order = Order(sizes, run.seed, run.batch.global_, run.batch.micro, lanes, run.data.window)
    steps = max(1, round(run.epochs * order.steps_per_epoch))
    about = opened.about()
    return SourceSet(source, train, heldout, order, steps, about["identity"], about)


def logit_classes(run: PretrainRun, class_names: Sequence[str]) -> int:
    """How many logits the classifier has; 0 where the loss needs none."""
    return len(class_names) if run.loss.uses_logits else 0


def shards_to_read(data: SourceSet, world_size: int) -> dict[str, str]:
    """How many shards a rank reads from at a time: what a cache must hold, and with fewer lanes fewer."""
    sizes = data.order.shard_sizes
    if max(sizes) == 1:
        return {}  # single files
    at_once, soon = (len(data.order.shards_ahead(0, range(steps), 0, world_size)) for steps in (1, 100))
    return {"shards a rank reads": f"{at_once} in its first step, {soon} in its first 100, of {len(sizes)}"}


def batches(run: PretrainRun, data: SourceSet, world: World, start: int) -> Iterable[list[Batch]]:
    """This rank's micro-batches from step `start` on."""
    steps = train_steps_data(
        data.source,
        data.train,
        data.order,
        run.input,
        run.data.augment,
        views=run.loss.views,
        steps=range(start, data.steps),
        world=world,
        workers=run.data.workers,
    )
    return logged(steps, data.source, Path(run.out), start, world) if run.data.log_samples else steps
