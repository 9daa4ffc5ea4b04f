"""The fine-tuning journey, one trial: a source model, a downstream set, a method. Read it top to bottom."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nc_dist import checkpoint
from nc_dist.collapse import Collapse, collapse
from nc_dist.config import FinetuneRun
from nc_dist.data.augment import InputSpec
from nc_dist.data.catalog import open_source
from nc_dist.data.order import Order, check_world, default_lanes
from nc_dist.data.source import Source, check_samples
from nc_dist.data.stream import eval_batches, kept_shard_sizes, train_steps_data
from nc_dist.data.subset import per_class
from nc_dist.engine import DeepSpeedSpec, evaluating
from nc_dist.errors import InputError, Preempted
from nc_dist.features import Probe, forwarded, gathered_features, passes_over
from nc_dist.identity import hash_file
from nc_dist.loop import Objective, every, train_steps
from nc_dist.losses import CrossEntropy
from nc_dist.make_engine import make_engine
from nc_dist.methods import LinearProbe
from nc_dist.methods.freezing import train_mode, trainable
from nc_dist.model import Exported, Model, classifier_of, export, export_folder, load_exported
from nc_dist.nc.metrics import LIVE
from nc_dist.probe import fit
from nc_dist.tracking import Tracker, flat_probes
from nc_dist.world import World

SAVES = 6  # of a run when save_every is not given


@dataclass(frozen=True)
class TargetSet:
    """A downstream set: train positions (the label budget), and the whole test split."""

    train: Source
    positions: np.ndarray
    test: Source

    @property
    def num_classes(self) -> int:
        return len(self.train.class_names)


def open_target_set(run: FinetuneRun) -> TargetSet:
    """Open both splits; InputError when there is no test split or its classes differ."""
    train = open_source(run.data.train, "train")
    if run.data.test is None and ":" not in run.data.train and Path(run.data.train).exists():
        raise InputError(f"data.test: required, as data.train={run.data.train!r} is a folder without a test split")
    test = open_source(run.data.test or run.data.train.partition(":")[0], "test")
    if train.class_names != test.class_names:
        raise InputError(f"data.test={run.data.test!r}: its classes are not those of data.train={run.data.train!r}")
    if train.identity() == test.identity():
        raise InputError(f"data.test: the very samples of data.train={run.data.train!r}; name another split")
    smallest = int(np.bincount(train.labels).min())
    if run.data.shots is not None and run.data.shots > smallest:
        raise InputError(f"data.shots={run.data.shots}: {run.data.train!r} has a class of {smallest} samples")
    positions = per_class(train.labels, run.data.shots, run.data.subset_seed, purpose="shots")
    return TargetSet(train, positions, test)


def finetune(run: FinetuneRun, world: World, stop: Callable[[], bool]) -> dict[str, Any]:
    """Adapt the source model by the run's method and test it once; returns one row of the ledger.

    There is one setting and no choice among any, so nothing is validated: train is all of the label budget (the linear
    probe chooses its penalty inside it). Raises Preempted, everything saved, when `stop()` is true.
    """
    began, started, out = time.perf_counter(), time.time(), Path(run.out)
    exported, data = load_exported(run.source), open_target_set(run)
    model = run.method.apply(exported.model, data.num_classes, run.seed).to(world.device)
    before = measure_splits(run, data, model, exported.input, world)
    trained, total = trainable(model)

    newest = world.broadcast(checkpoint.latest(out / "checkpoints") if world.rank == 0 else None)
    tracker = Tracker(out, world, checkpoint.step_of(newest))
    tracker.custom_page()
    if newest is None:
        tracker.scalars(0, flat_probes(before))
    extra: dict[str, Any] = {}
    if isinstance(run.method, LinearProbe):
        extra = fit_classifier(run, data, model, exported.input, world)
    else:
        train_method(run, data, model, exported.input, world, tracker, newest, stop)
    after = measure_splits(run, data, model, exported.input, world)
    result = {
        **ledger_names(run, exported),
        "source_weights": hash_file(exported.folder / "model.safetensors"),
        "accuracy": after["test"]["acc1"],
        "metric": "top1",
        "nc1_source": exported.config.get("nc1_source"),
        "nc1_downstream": after["train"]["after"]["nc1"],
        **{
            f"nc1_{split}_{when}": nc[split]["after"]["nc1"]
            for when, nc in (("before", before), ("after", after))
            for split in ("train", "test")
        },
        "train_accuracy": after["train"]["acc1"],
        "trainable_percent": 100 * trained / total,
        "trainable_parameters": trained,
        "device": world.device_name,
        "train_samples": len(data.positions),
        "test_samples": len(data.test.labels),
        **extra,
        "nc": {
            f"{split}_{when}": nc[split]["after"] for when, nc in (("before", before), ("after", after)) for split in nc
        },
        "seconds": time.perf_counter() - began,
        "started": started,
        "ended": time.time(),
    }
    if world.rank == 0:
        details = {"variant": result["variant"], "method": run.method.kind, "source": str(run.source)}
        export(model, out / "export", exported.input, data.train.class_names, details)
        tracker.hparams(result, result)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # the export holds what is worth keeping
    tracker.close()
    return result


def measure_splits(run: FinetuneRun, data: TargetSet, model: Model, input: InputSpec, world: World) -> dict[str, Any]:
    """NC of what the classifier sees and accuracy: train's probe, and all of test about its own and train's means."""
    probe = per_class(data.train.labels, run.probe.per_class, run.seed, data.positions)
    splits = {"train": (data.train, probe), "test": (data.test, np.arange(len(data.test.labels)))}
    classifier, dtype = classifier_of(model), next(model.parameters()).dtype
    assert classifier is not None
    found: dict[str, Collapse] = {}
    with evaluating(model):
        for name, (source, positions) in splits.items():
            chosen = Probe(source, positions, run.seed)
            found[name] = collapse(
                passes_over(
                    chosen,
                    lambda x: model.observe(x, ()),
                    input,
                    dtype,
                    run.probe.batch,
                    world,
                    run.data.workers,
                    headless=True,
                ),
                chosen,
                world,
                {"after": classifier},
                only=LIVE,
                reference=found["train"].moments if name == "test" else None,
            )
    return {name: collapsed.by_place(headless=True) for name, collapsed in found.items()}


def fit_classifier(run: FinetuneRun, data: TargetSet, model: Model, input: InputSpec, world: World) -> dict[str, Any]:
    """Fit the classifier on frozen features and put it into the model; what was chosen."""
    assert isinstance(run.method, LinearProbe) and model.classifier is not None
    with evaluating(model):
        loaded = eval_batches(data.train, data.positions, input, run.probe.batch, world, run.data.workers)
        feats, targets = gathered_features(
            forwarded(lambda x: model.observe(x, ()), loaded, input, torch.float32), "after"
        )
    parts = world.gather_objects((feats.cpu(), targets.cpu()))
    features, labels = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    found = fit(features, labels, data.num_classes, run.method.l2, run.seed)
    with torch.no_grad():
        model.classifier.weight.copy_(found.weight_KD)
        model.classifier.bias.copy_(found.bias_K)
    return {"l2": found.l2, "l2_at_edge": found.at_edge, "validation_accuracy": found.validation_accuracy}


def train_method(
    run: FinetuneRun,
    data: TargetSet,
    model: Model,
    input: InputSpec,
    world: World,
    tracker: Tracker,
    newest: Path | None,
    stop: Callable[[], bool],
) -> None:
    """Train what the method left trainable, with cross-entropy; resumes from the run's own checkpoint."""
    order = target_order(run, data)
    steps = target_steps(run, order)
    engine = make_engine(model, run.engine, run.optim, (order.global_batch, order.micro), world)
    folder = Path(run.out) / "checkpoints"
    start = engine.load(newest)["step"] if newest else 0
    save_every = run.save_every or max(1, steps // SAVES)
    loss = CrossEntropy()
    objective = Objective(loss, input, order.micro_per_step, run.seed, run.optim.lr, run.schedule, steps)
    loaded = train_steps_data(
        data.train,
        data.positions,
        order,
        input,
        run.data.augment,
        views=1,
        steps=range(start, steps),
        world=world,
        workers=run.data.workers,
    )
    for step in train_steps(engine, loaded, objective, world, start, stop, train_mode):
        last, asked = step.number == steps, step.stop_requested()
        if every(run.log_every, step.number) or last:
            shown = {"steps": steps, "steps_per_epoch": order.steps_per_epoch, "time": time.time()}
            speed = {"perf/images_per_second": order.global_batch / step.seconds}
            tracker.scalars(step.number, {**step.metrics(), **speed}, **shown)
        if (every(save_every, step.number) or asked) and not last:
            checkpoint.save(folder, engine, step.number, {"step": step.number}, world)
        if asked and not last:
            tracker.close()
            raise Preempted(step.number)


def target_order(run: FinetuneRun, data: TargetSet) -> Order:
    """The order of the label budget."""
    sizes = kept_shard_sizes(data.train, data.positions)
    global_batch, micro = run.batch.global_, run.batch.micro
    return Order(sizes, run.seed, global_batch, micro, default_lanes(global_batch, micro))


def target_steps(run: FinetuneRun, order: Order) -> int:
    """Optimiser steps of the whole run."""
    return max(1, round(run.epochs * order.steps_per_epoch))


def dataset_name(run: FinetuneRun) -> str:
    """What the downstream set is called: `pets` for pets:train as for /data/pets/train."""
    path = Path(run.data.train.partition(":")[0] or run.data.train)
    return run.data.name or (path.parent.name if path.name in ("train", "training", "trainval") else path.name)


def check(run: FinetuneRun, world_size: int) -> dict[str, Any]:
    """The plan of the run; InputError for all that can be wrong with source, data, method and world size."""
    data, model = check_target(run)
    if not isinstance(run.method, LinearProbe):
        check_world(target_order(run, data).micro_per_step, world_size)
    seen = check_samples(data.train, data.positions)
    check_samples(data.test, range(len(data.test.labels)))
    trained, total = trainable(model)
    return {
        "training samples": len(data.positions),
        "test samples": len(data.test.labels),
        "steps": "L-BFGS" if isinstance(run.method, LinearProbe) else target_steps(run, target_order(run, data)),
        "trained parameters": f"{trained} of {total} ({100 * trained / total:.2f} %)",
        "images read and decoded as a check": f"{seen} of {len(data.positions)}",
    }


def changed(run: FinetuneRun, result: dict[str, Any]) -> str | None:
    """Why the result is out of date: other weights of the source; None also where the source is gone."""
    try:
        now = hash_file(export_folder(run.source) / "model.safetensors")
    except InputError:
        return None
    return f"source={run.source} has other weights now" if result.get("source_weights", now) != now else None


def check_target(run: FinetuneRun) -> tuple[TargetSet, Model]:
    """Source, data and method of a trial, as they would be used; InputError for what does not fit."""
    data = open_target_set(run)
    model = run.method.apply(load_exported(run.source).model, data.num_classes, run.seed)
    if not isinstance(run.method, LinearProbe):
        target_order(run, data)
    if isinstance(run.engine, DeepSpeedSpec) and run.engine.zero == 3:
        raise InputError("engine.zero=3: fine-tuning takes stages 0, 1 and 2; a trial's model fits one device")
    return data, model


def ledger_names(run: FinetuneRun, exported: Exported) -> dict[str, Any]:
    """Who this trial is, in the report's words."""
    return {
        "journey": "finetune",
        "variant": exported.config.get("variant", exported.folder.parent.name),
        "dataset": dataset_name(run),
        "method": run.method.kind,
        "seed": run.seed,
        "shots": run.data.shots,
        "backbone": exported.model.spec.backbone.name,
        "lr": run.optim.lr,
        "weight_decay": run.optim.weight_decay,
        "epochs": run.epochs,
        "method_settings": run.method.model_dump(mode="json"),
        "trial": Path(run.out).name,
    }
