"""The fine-tuning journey, one trial: a source model, a downstream set, a method. Read it top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nc_dist import checkpoint
from nc_dist.collapse import Collapse, collapse
from nc_dist.config import FinetuneRun
from nc_dist.data.augment import InputSpec
from nc_dist.data.checks import check_samples
from nc_dist.data.damage import BadSamples
from nc_dist.data.order import check_state, check_world
from nc_dist.data.stream import eval_batches, train_steps_data
from nc_dist.data.subset import per_class
from nc_dist.engine import DeepSpeedSpec, evaluating
from nc_dist.engine.checks import check_engine, check_optim
from nc_dist.engine.make import make_engine
from nc_dist.errors import InputError, Preempted
from nc_dist.features import Probe, forwarded, gathered_features, passes_over
from nc_dist.heads import Linear
from nc_dist.identity import hash_file
from nc_dist.loop import NOT_WATCHED, At, every, train_steps
from nc_dist.losses import CrossEntropy
from nc_dist.methods import LinearProbe
from nc_dist.methods.freezing import train_mode, trainable
from nc_dist.model import Exported, Model, classifier_of, export, export_folder, load_exported
from nc_dist.nc.metrics import LIVE
from nc_dist.objective import Objective
from nc_dist.plan import notes
from nc_dist.probe import fit
from nc_dist.sample_log import logged
from nc_dist.skipped import LIMIT, Skipped
from nc_dist.target_set import TargetSet, dataset_name, open_target_set, target_order, target_steps
from nc_dist.tracking import Tracker, flat_probes
from nc_dist.world import World

SAVES = 6  # of a run when save_every is not given
METRICS = {"top1": "acc1", "mean_per_class": "acc1_mean_class"}  # what a set is judged by: its name in what is measured


def finetune(run: FinetuneRun, world: World, stop: Callable[[], bool], at: At = NOT_WATCHED) -> dict[str, Any]:
    """Adapt the source model by the run's method and test it once; returns one row of the ledger.

    There is one setting and no choice among any, so nothing is validated: train is all of the label budget (the linear
    probe chooses its penalty inside it). Raises Preempted, everything saved, when `stop()` is true.
    """
    began, started, out = time.perf_counter(), time.time(), Path(run.out)
    exported, bad = load_exported(run.source), BadSamples(out, run.data.bad_samples, world)
    data = open_target_set(run, exported)
    model = run.method.apply(exported.model, data.num_classes, run.seed).to(world.device)
    before = measure_splits(run, data, model, exported.input, world, bad)
    trained, total = trainable(model)

    newest = checkpoint.on_first(world, lambda: checkpoint.own_newest(out / checkpoint.CHECKPOINTS))
    tracker = Tracker(out, world, checkpoint.step_of(newest))
    tracker.custom_page()
    if newest is None:
        tracker.scalars(0, flat_probes(before))
    extra: dict[str, Any] = {}
    if isinstance(run.method, LinearProbe):
        extra = fit_classifier(run, data, model, exported.input, world, bad)
    else:
        train_method(run, data, model, exported.input, world, tracker, newest, stop, bad, at)
    after = measure_splits(run, data, model, exported.input, world, bad)
    result = {
        **ledger_names(run, exported),
        "source_weights": hash_file(exported.folder / "model.safetensors"),
        "accuracy": after["test"][METRICS[data.metric]],
        "metric": data.metric,
        "top1": after["test"]["acc1"],
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
        "bad_samples": len(bad),
        "sets": data.about,
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
    tracker.close()
    return result


def measure_splits(
    run: FinetuneRun, data: TargetSet, model: Model, input: InputSpec, world: World, bad: BadSamples
) -> dict[str, Any]:
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
                    bad=bad,
                ),
                chosen,
                world,
                {"after": classifier},
                only=LIVE,
                reference=found["train"].moments if name == "test" else None,
            )
    return {name: collapsed.by_place(headless=True) for name, collapsed in found.items()}


def fit_classifier(
    run: FinetuneRun, data: TargetSet, model: Model, input: InputSpec, world: World, bad: BadSamples
) -> dict[str, Any]:
    """Fit the classifier on frozen features and put it into the model; what was chosen."""
    assert isinstance(run.method, LinearProbe) and isinstance(model.classifier, Linear)
    with evaluating(model):
        loaded = eval_batches(data.train, data.positions, input, run.probe.batch, world, run.data.workers, bad)
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
    bad: BadSamples,
    at: At,
) -> None:
    """Train what the method left trainable, with cross-entropy; resumes from the run's own checkpoint."""
    check_engine(run.engine, world.device.type == "cuda")
    order = target_order(run, data)
    steps = target_steps(run, order)
    engine = make_engine(model, run.engine, run.optim, (order.global_batch, order.micro), world)
    folder = Path(run.out) / "checkpoints"
    identity = data.about["train"]["identity"]
    state: dict[str, Any] = engine.load(newest) if newest else {}
    start = check_state(order, identity, state["order"]) if newest else 0
    skipped = Skipped(Path(run.out), LIMIT, run.engine.precision == "fp16", world, start, state.get("skipped", 0))
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
    if run.data.log_samples:
        loaded = logged(loaded, data.train, Path(run.out), start, world)

    def beside(partial: Path) -> None:
        if world.rank == 0:
            about = {"method": run.method.kind, "source": str(run.source)}
            export(model, partial / "export", input, data.train.class_names, about)

    for step in train_steps(engine, loaded, objective, world, start, stop, train_mode, at):
        last, asked = step.number == steps, step.stop_requested
        if step.met_damage:
            bad.add(data.train, step.faults(), f"step {step.number}")
        skipped.add(step, data.train)
        if every(run.log_every, step.number) or last:
            shown = {"steps": steps, "steps_per_epoch": order.steps_per_epoch, "time": time.time()}
            speed = {"perf/images_per_second": order.global_batch / step.seconds, "train/skipped": skipped.count}
            tracker.scalars(step.number, {**step.metrics(), **speed}, **shown)
        if (every(save_every, step.number) or asked) and not last:
            state = {"step": step.number, "order": order.state(step.number, identity), "skipped": skipped.count}
            checkpoint.save(folder, engine, step.number, state, world, beside=beside)
        if asked and not last:
            tracker.close()
            raise Preempted(step.number)


def check(run: FinetuneRun, world_size: int) -> dict[str, Any]:
    """The plan of the run; InputError for all that can be wrong with source, data, method and world size."""
    data, model = check_target(run)
    check_engine(run.engine, torch.cuda.is_available() or bool(run.launch.gpus))
    if not isinstance(run.method, LinearProbe):
        check_world(target_order(run, data).micro_per_step, world_size)
    seen = check_samples(data.train, data.positions, run.data.bad_samples)
    check_samples(data.test, range(len(data.test.labels)), run.data.bad_samples)
    trained, total = trainable(model)
    return {
        "training samples": len(data.positions),
        "test samples": len(data.test.labels),
        "steps": "L-BFGS" if isinstance(run.method, LinearProbe) else target_steps(run, target_order(run, data)),
        "trained parameters": f"{trained} of {total} ({100 * trained / total:.2f} %)",
        "images read and decoded as a check": seen,
        "judged by": data.metric,
        **notes(data.about),
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
    exported = load_exported(run.source)
    data = open_target_set(run, exported)
    model = run.method.apply(exported.model, data.num_classes, run.seed)
    if not isinstance(run.method, LinearProbe):
        target_order(run, data)
    check_optim(run.optim, run.engine)
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
