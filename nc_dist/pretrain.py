"""The pre-training journey: read it top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nc_dist.config import PretrainRun
from nc_dist.data.damage import BadSamples
from nc_dist.data.order import check_world
from nc_dist.engine.checks import check_engine
from nc_dist.errors import Preempted
from nc_dist.loop import NOT_WATCHED, At, Step, every, train_steps
from nc_dist.model import Model
from nc_dist.objective import Objective
from nc_dist.perf import Perf, perf_of
from nc_dist.plan.time import intervals
from nc_dist.profiling import profiled, steps_of
from nc_dist.skipped import Skipped
from nc_dist.source_model import finish, hparams
from nc_dist.source_probes import NO_SCORE, Measures
from nc_dist.source_saves import Saves, begin
from nc_dist.source_set import SourceSet, batches, logit_classes, open_source_set
from nc_dist.tracking import Tracker
from nc_dist.world import World


def pretrain(run: PretrainRun, world: World, stop: Callable[[], bool], at: At = NOT_WATCHED) -> dict[str, Any]:
    """Train one source model, measuring NC live; returns the result that the report shows.

    Raises Preempted, everything saved, when `stop()` is true on any rank.
    """
    out, data = Path(run.out), open_source_set(run)
    check_world(data.order.micro_per_step, world.size)
    check_engine(
        run.engine, world.device.type == "cuda", run.batch_norm, micros=data.order.micro_per_step // world.size
    )
    torch.manual_seed(run.seed)
    model = Model(run.model, logit_classes(run, data.source.class_names))
    if run.batch_norm == "sync":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # in place, names stay
    engine, progress = begin(run, data, model, world)
    start = progress.step

    measure_every, save_every = intervals(run.measure_every, run.save_every, data.steps, data.order.steps_per_epoch)
    bad = BadSamples(out, run.data.bad_samples, world)
    skipped = Skipped(out, run.max_skipped, run.engine.precision == "fp16", world, start, progress.skipped)
    tracker, perf = Tracker(out, world, start), perf_of(run, model.num_classes, world)
    tracker.custom_page()
    measures = Measures(run, data, engine, world, bad, tracker)
    saves = Saves(run, data, engine, world, save_every, progress)
    alive = partial(at, data.steps, "between steps")
    if start == 0:
        measures.take(0)
    steps = train_steps(engine, batches(run, data, world, start), objective_of(run, data), world, start, stop, at=at)
    for step in profiled(steps, steps_of(run.profile.steps, data.steps), start, out, world):
        due, last = saves.due(step.number), step.number == data.steps
        asked, score = step.stop_requested, NO_SCORE
        if step.met_damage:
            bad.add(data.source, step.faults(), f"step {step.number}")
        skipped.add(step, data.source)
        perf.add(step)
        if every(run.log_every, step.number) or last:
            tracker.scalars(step.number, scalars(run, data, step, skipped, perf), **about(data, step))
        if every(measure_every, step.number) or due:
            score = measures.take(step.number, draw=due and not last)
        if due or asked:
            saves.save(step.number, score, skipped.count)
        if asked:
            tracker.close()
            saves.close(lambda: True, alive)
            raise Preempted(step.number)

    result = finish(run, data, engine, world, measures.newest(), bad)
    measures.show_class_means(data.steps, projector=True)
    tracker.hparams(hparams(run), {**result, "accuracy": result["source_accuracy"]})
    tracker.close()
    return result | {"skipped_steps": skipped.count} | saves.close(stop, alive) | {"seconds": saves.seconds()}


def objective_of(run: PretrainRun, data: SourceSet) -> Objective:
    """What the run minimises."""
    return Objective(
        loss=run.loss,
        regularisers=run.regularisers,
        adversary=run.adversary,
        mix=run.data.mix,
        input=run.input,
        micro_per_step=data.order.micro_per_step,
        seed=run.seed,
        peak_lr=run.optim.lr,
        schedule=run.schedule,
        steps=data.steps,
    )


def scalars(run: PretrainRun, data: SourceSet, step: Step, skipped: Skipped, perf: Perf) -> dict[str, float]:
    """The scalars of a step."""
    return {
        **step.metrics(),
        "train/epoch": step.number / data.order.steps_per_epoch,
        "train/samples_seen": step.number * run.batch.global_,
        "train/skipped": skipped.count,
        **perf.scalars(),
    }


def about(data: SourceSet, step: Step) -> dict[str, Any]:
    """What the console's line needs besides."""
    return {"steps": data.steps, "steps_per_epoch": data.order.steps_per_epoch, "time": time.time()}
