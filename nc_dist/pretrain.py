"""The pre-training journey: read it top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nc_dist import checkpoint
from nc_dist.config import PretrainRun
from nc_dist.data.damage import BadSamples
from nc_dist.data.order import check_state, check_world
from nc_dist.errors import Preempted
from nc_dist.loop import Step, every, train_steps
from nc_dist.make_engine import make_engine
from nc_dist.model import Model
from nc_dist.objective import Objective
from nc_dist.source_model import NO_SCORE, export_to, finish, hparams, measure_probes, score_of
from nc_dist.source_set import SourceSet, batches, open_source_set
from nc_dist.tracking import Tracker, flat_probes, nc_warnings
from nc_dist.world import World

LIVE_POINTS = 12  # of a run when measure_every is not given


def pretrain(run: PretrainRun, world: World, stop: Callable[[], bool]) -> dict[str, Any]:
    """Train one source model, measuring NC live; returns the result that the report shows.

    Raises Preempted, everything saved, when `stop()` is true on any rank.
    """
    began, out = time.time(), Path(run.out)
    data = open_source_set(run)
    check_world(data.order.micro_per_step, world.size)
    classes = len(data.source.class_names)
    torch.manual_seed(run.seed)
    model = Model(run.model, classes if run.loss.uses_logits else 0)
    engine = make_engine(model, run.engine, run.optim, (run.batch.global_, run.batch.micro), world, run.ema)

    # Where to begin: 1 this run's newest checkpoint, 2 weights that the backbone's spec names, 3 scratch.
    newest = world.broadcast(checkpoint.latest(out / "checkpoints") if world.rank == 0 else None)
    state: dict[str, Any] = engine.load(newest) if newest else {"step": 0, "best": NO_SCORE, "seconds": 0.0}
    if newest:
        check_state(data.order, data.identity, state["order"])
    bad = BadSamples(out, run.data.bad_samples, world)
    start, best, earlier = state["step"], state["best"], state["seconds"]

    tracker = Tracker(out, world, start)
    tracker.custom_page()
    objective = objective_of(run, data)
    measure_every = run.measure_every or max(1, data.steps // LIVE_POINTS)
    save_every = run.save_every or min(2 * measure_every, data.order.steps_per_epoch)
    nc: dict[str, Any] = {}
    measuring = 0.0  # seconds
    if start == 0:
        nc = measure_probes(run, data, engine, world, bad)
        tracker.scalars(0, flat_probes(nc), **nc_warnings(nc))
    for step in train_steps(engine, batches(run, data, world, start), objective, world, start, stop):
        last, score = step.number == data.steps, NO_SCORE
        if step.met_damage():
            bad.add(data.source, step.faults(), f"step {step.number}")
        asked = step.stop_requested() and not last
        save = every(save_every, step.number) or last
        if every(run.log_every, step.number) or last:
            tracker.scalars(step.number, progress(run, data, step), **about(data, step))
        if every(measure_every, step.number) or save:
            asked_at = time.time()
            nc = measure_probes(run, data, engine, world, bad)
            measuring += time.time() - asked_at
            score = score_of(nc)
            share = {"perf/measure_frac": measuring / (time.time() - began)}
            tracker.scalars(step.number, flat_probes(nc) | share, **nc_warnings(nc))
        if save or asked:
            state = {"step": step.number, "best": max(best, score), "seconds": earlier + time.time() - began}
            state["order"] = data.order.state(step.number, data.identity)
            checkpoint.save(
                out / "checkpoints",
                engine,
                step.number,
                state,
                world,
                best=score > best,
                keep=run.keep,
                beside=lambda folder: export_to(folder / "export", run, data, engine, world),
            )
            best = state["best"]
        if asked:
            tracker.close()
            raise Preempted(step.number)

    nc = nc or measure_probes(run, data, engine, world, bad)
    result = finish(run, data, engine, world, nc, bad)
    result["seconds"] = earlier + time.time() - began
    if world.rank == 0:
        tracker.hparams(hparams(run), {**result, "accuracy": result["source_accuracy"]})
    tracker.close()
    return result


def objective_of(run: PretrainRun, data: SourceSet) -> Objective:
    """What the run minimises."""
    return Objective(
        run.loss,
        run.input,
        data.order.micro_per_step,
        run.seed,
        run.optim.lr,
        run.schedule,
        data.steps,
        run.data.mix,
        run.regularisers,
        run.adversary,
    )


def progress(run: PretrainRun, data: SourceSet, step: Step) -> dict[str, float]:
    """The scalars of a step."""
    per_second = run.batch.global_ / step.seconds
    return {
        **step.metrics(),
        "train/epoch": step.number / data.order.steps_per_epoch,
        "train/samples_seen": step.number * run.batch.global_,
        "perf/images_per_second": per_second,
        "perf/data_wait_frac": step.data_seconds / step.seconds,
    }


def about(data: SourceSet, step: Step) -> dict[str, Any]:
    """What the console's line needs besides."""
    return {"steps": data.steps, "steps_per_epoch": data.order.steps_per_epoch, "time": time.time()}
