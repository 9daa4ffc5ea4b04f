"""The class means of a source model's features at the end of its run. For `pretrain`."""

from __future__ import annotations

import torch

from nc_dist.config import PretrainRun
from nc_dist.data.damage import BadSamples
from nc_dist.data.subset import per_class
from nc_dist.engine import Engine
from nc_dist.features import Observe, Probe, passes_over
from nc_dist.nc import ClassMoments
from nc_dist.nc.statistics import Statistics, Undefined, centred_means
from nc_dist.source_set import SourceSet
from nc_dist.tracking import Tracker
from nc_dist.world import World


def show_class_means(
    run: PretrainRun, data: SourceSet, engine: Engine, world: World, bad: BadSamples, tracker: Tracker
) -> None:
    """Figure and projector of the class means as they are now, or a warning that says why there are none."""
    stats = class_statistics(run, data, engine, world, bad)
    step, names = data.steps, data.source.class_names
    try:
        tracker.class_means(step, centred_means(stats).cpu(), [names[int(k)] for k in stats.present_P])
    except Undefined as why:
        tracker.scalars(step, {}, warnings=[f"train: no figure of class means, {why}"])


def class_statistics(run: PretrainRun, data: SourceSet, engine: Engine, world: World, bad: BadSamples) -> Statistics:
    """Statistics of the train probe before the head; the same on every rank, each of which must call it."""
    chosen = per_class(data.source.labels, run.probe.per_class, run.seed, data.train)
    forward: Observe = lambda x: (engine.eval_forward(x), {})  # noqa: E731
    begin = passes_over(
        Probe(data.source, chosen, run.seed), forward, run.input, engine.input_dtype, run.probe.batch, world,
        run.data.workers, engine.module.headless, bad,
    )  # fmt: skip
    place, classes = "after" if engine.module.headless else "before", len(data.source.class_names)
    moments: ClassMoments | None = None
    for seen in begin():
        feats = seen.features[place]
        moments = moments or ClassMoments(classes, feats.shape[1], dtype=torch.float64, device=feats.device)
        moments.update(feats, seen.labels)
    assert moments is not None, "a probe has at least one batch on every rank"
    return moments.all_reduce(world.sum_).statistics()
