"""The pre-training journey: read it top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nc_dist import checkpoint, pretrained
from nc_dist.class_means import show_class_means
from nc_dist.config import PretrainRun
from nc_dist.data.damage import BadSamples
from nc_dist.data.order import check_world
from nc_dist.engine_check import check_engine
from nc_dist.errors import Preempted
from nc_dist.loop import NOT_WATCHED, At, Step, every, train_steps
from nc_dist.make_engine import make_engine
from nc_dist.model import Model
from nc_dist.objective import Objective
from nc_dist.perf import Perf, perf_of
from nc_dist.plan_time import intervals
from nc_dist.profiling import profiled, steps_of
from nc_dist.skipped import Skipped
from nc_dist.source_model import NO_SCORE, ema_scalars, export_all, finish, hparams, measure, score_of
from nc_dist.source_set import SourceSet, batches, open_source_set
from nc_dist.tracking import Tracker, flat_probes, nc_warnings
from nc_dist.world import World


def pretrain(run: PretrainRun, world: World, stop: Callable[[], bool], at: At = NOT_WATCHED) -> dict[str, Any]:
    """Train one source model, measuring NC live; returns the result that the report shows.

    Raises Preempted, everything saved, when `stop()` is true on any rank.
    """
    began, out = time.time(), Path(run.out)
    data = open_source_set(run)
    check_world(data.order.micro_per_step, world.size)
    micros = data.order.micro_per_step // world.size
    check_engine(run.engine, world.device.type == "cuda", run.batch_norm, micros)
    classes = len(data.source.class_names)
    torch.manual_seed(run.seed)
    model = Model(run.model, classes if run.loss.uses_logits else 0)
    if run.batch_norm == "sync":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # in place, names stay

    # 1 this run's newest checkpoint, 2 that of run.resume, 3 weights that the backbone's spec names, 4 scratch.
    folder = out / checkpoint.CHECKPOINTS
    newest = checkpoint.on_first(world, lambda: checkpoint.beginning(run, data))
    if newest is None:
        pretrained.start_from(run.model.backbone, model.backbone, out, world.rank == 0)
    engine = make_engine(model, run.engine, run.optim, (run.batch.global_, run.batch.micro), world, run.ema)
    scratch = {"step": 0, "best": NO_SCORE, "best_step": None, "seconds": 0.0}
    state = scratch | (engine.load(newest) if newest else {})
    if newest and newest.parent != folder:
        state = scratch | {"step": state["step"]}  # the record of another run is not this one's
    bad = BadSamples(out, run.data.bad_samples, world)
    start, best, best_step, earlier = (state[key] for key in ("step", "best", "best_step", "seconds"))
    retention = checkpoint.retention_of(run, data)
    uploads = checkpoint.Uploads(run.upload, folder, retention, world)
    skipped = Skipped(out, run.max_skipped, run.engine.precision == "fp16", world, start, state.get("skipped", 0))

    tracker, perf = Tracker(out, world, start), perf_of(run, model.num_classes, world)
    tracker.custom_page()
    objective = objective_of(run, data)
    measure_every, save_every = intervals(run.measure_every, run.save_every, data.steps, data.order.steps_per_epoch)
    nc, nc_ema = dict[str, Any](), dict[str, Any]()
    measuring = 0.0  # seconds
    if start == 0:
        nc, nc_ema = measure(run, data, engine, world, bad)
        tracker.scalars(0, flat_probes(nc) | ema_scalars(nc_ema), **nc_warnings(nc))
    steps = train_steps(engine, batches(run, data, world, start), objective, world, start, stop, at=at)
    for step in profiled(steps, steps_of(run.profile.steps, data.steps), start, out, world):
        last, score = step.number == data.steps, NO_SCORE
        if step.met_damage():
            bad.add(data.source, step.faults(), f"step {step.number}")
        skipped.add(step, data.source)
        asked = step.stop_requested() and not last
        save = every(save_every, step.number) or step.number in retention.chosen or last
        if every(run.log_every, step.number) or last:
            tracker.scalars(step.number, progress(run, data, step, skipped, perf), **about(data, step))
        if every(measure_every, step.number) or save:
            asked_at = time.time()
            nc, nc_ema = measure(run, data, engine, world, bad)
            measuring += time.time() - asked_at
            score = score_of(nc)
            share = {"perf/measure_frac": measuring / (time.time() - began)}
            tracker.scalars(step.number, flat_probes(nc) | ema_scalars(nc_ema) | share, **nc_warnings(nc))
        if save or asked:
            is_best = score > best
            best, best_step = (score, step.number) if is_best else (best, best_step)
            state = {"step": step.number, "best": best, "best_step": best_step, "skipped": skipped.count}
            state |= {"seconds": earlier + time.time() - began} | checkpoint.state_of(run, data, step.number)
            checkpoint.save(
                folder,
                engine,
                step.number,
                state,
                world,
                best=is_best,
                retention=retention,
                in_use=uploads.in_use,
                beside=lambda partial: export_all(partial, run, data, engine, world),
            )
            uploads.add(step.number)
        if asked:
            uploads.close()
            tracker.close()
            raise Preempted(step.number)

    if not nc:
        nc, nc_ema = measure(run, data, engine, world, bad)
    result = finish(run, data, engine, world, nc, nc_ema, bad)
    result["skipped_steps"] = skipped.count
    result |= {"best_step": best_step, "best_score": best if best_step else None} | uploads.close()
    result["seconds"] = earlier + time.time() - began
    show_class_means(run, data, engine, world, bad, tracker)
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


def progress(run: PretrainRun, data: SourceSet, step: Step, skipped: Skipped, perf: Perf) -> dict[str, float]:
    """The scalars of a step."""
    return {
        **step.metrics(),
        "train/epoch": step.number / data.order.steps_per_epoch,
        "train/samples_seen": step.number * run.batch.global_,
        "train/skipped": skipped.count,
        **perf.scalars(step),
    }


def about(data: SourceSet, step: Step) -> dict[str, Any]:
    """What the console's line needs besides."""
    return {"steps": data.steps, "steps_per_epoch": data.order.steps_per_epoch, "time": time.time()}
