"""What is found out about a source model at its end: its source accuracy, the result, its exports. For `pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nc_dist.checkpoint.shared_faults import on_all, on_first
from nc_dist.config import PretrainRun
from nc_dist.data.catalog import open_source
from nc_dist.data.damage import BadSamples
from nc_dist.data.stream import eval_batches
from nc_dist.data.subset import per_class
from nc_dist.engine import Engine
from nc_dist.features import forwarded, gathered_features
from nc_dist.initial_weights import noted
from nc_dist.model import export
from nc_dist.probe import fit
from nc_dist.source_probes import Measured, forward_of
from nc_dist.source_set import SourceSet
from nc_dist.world import World

SOURCE_PROBE_L2 = (1e-4, 1e-3, 1e-2, 1e-1)


def finish(
    run: PretrainRun,
    data: SourceSet,
    engine: Engine,
    world: World,
    measured: Measured,
    bad: BadSamples,
) -> dict[str, Any]:
    """Export the model, find the source accuracy, put the result together."""
    found = found_out(run, data, engine, world, measured.nc, bad)
    averaged: dict[str, Any] = {}
    if run.ema is not None:
        with engine.averaged():
            averaged = found_out(run, data, engine, world, measured.nc_ema, bad)
        found["ema"] = averaged
    export_all(Path(run.out), run, data, engine, world, found["nc1_source"], averaged.get("nc1_source"))
    world.barrier()
    engine_name = f"deepspeed zero-{run.engine.zero}" if run.engine.kind == "deepspeed" else "torch"
    return {
        **{"journey": "pretrain", **hparams(run)},
        **found,
        "weights": noted(Path(run.out)),
        "steps": data.steps,
        "train_samples": len(data.train),
        "dropped_per_epoch": data.order.dropped,
        "bad_samples": len(bad),
        "sets": {"train": data.about},
        "engine": engine_name,
        "world_size": world.size,
        "device": world.device_name,
    }


def found_out(
    run: PretrainRun, data: SourceSet, engine: Engine, world: World, nc: dict[str, Any], bad: BadSamples
) -> dict[str, Any]:
    """The result's numbers about the weights that the engine has now, whose NC is `nc`."""
    accuracy = source_accuracy(run, data, engine, world, bad) if run.data.test else {}
    named = {f"{probe}_{place}": values for probe, places in nc.items() for place, values in places.items()}
    return {
        **{"source_accuracy": None, "source_ncc_accuracy": None},
        **accuracy,
        "nc1_source": nc["train"]["before"]["nc1"],
        "nc": {key: value for key, value in named.items() if isinstance(value, dict)},
        "heldout_accuracy": named.get("heldout_acc1"),
    }


def export_all(
    folder: Path,
    run: PretrainRun,
    data: SourceSet,
    engine: Engine,
    world: World,
    nc1: float | None = None,
    nc1_ema: float | None = None,
) -> None:
    """Export the model, whose NC1 is `nc1`, to `export`; averaged weights, where the run has them, to `export_ema`.

    Faults on every rank when one fails: going over to the averaged weights and back is a collective of all.
    """
    on_all(world, lambda: export_to(folder / "export", run, data, engine, world, nc1_source=nc1))
    if run.ema is not None:
        with engine.averaged():
            on_all(world, lambda: export_to(folder / "export_ema", run, data, engine, world, nc1_source=nc1_ema))


def export_to(
    folder: Path, run: PretrainRun, data: SourceSet, engine: Engine, world: World, **details: float | None
) -> None:
    """Export the model as it is now; every rank calls it, rank 0 writes."""
    with engine.gathered() as model:
        if world.rank == 0:
            about = {"variant": run.variant or Path(run.out).name, "data": data.identity, **details}
            about["decoder"] = data.source.decoder
            export(model, folder, run.input, data.source.class_names, about)


def source_accuracy(
    run: PretrainRun, data: SourceSet, engine: Engine, world: World, bad: BadSamples
) -> dict[str, float]:
    """Linear-probe and nearest-class-centre accuracy on the source's test set (protocol: the same for all losses)."""
    assert run.data.test is not None
    test = open_source(run.data.test, "test", run.data)
    kept = np.sort(np.concatenate([data.train, data.heldout]))
    chosen = per_class(data.source.labels, run.probe.source_per_class, run.seed, kept, purpose="source accuracy")
    parts = []
    for source, positions in ((data.source, chosen), (test, np.arange(len(test.labels)))):
        loaded = eval_batches(source, positions, run.input, run.probe.batch, world, run.data.workers, bad)
        seen = forwarded(forward_of(engine), loaded, run.input, engine.input_dtype)
        feats, labels = gathered_features(seen, "before")
        parts.append(world.collect((feats.cpu(), labels.cpu())))
    # Minutes for a thousand classes: the other ranks wait in short collectives, not in one that runs out of time.
    return on_first(world, lambda: _accuracies(parts, len(data.source.class_names), run.seed, world.device))


def _accuracies(
    parts: list[list[tuple[Tensor, Tensor]]], num_classes: int, seed: int, device: torch.device
) -> dict[str, float]:
    """Of features and labels of the training and the test samples, each as the ranks had them, in fp64 on `device`."""
    (train_x, train_y), (test_x, test_y) = (
        tuple(torch.cat(column).to(device) for column in zip(*ranks, strict=True)) for ranks in parts
    )
    linear = fit(train_x, train_y, num_classes, SOURCE_PROBE_L2, seed)
    means = torch.stack([train_x[train_y == k].double().mean(0) for k in range(num_classes)])
    nearest = torch.cdist(test_x.double(), means).argmin(1)
    return {
        "source_accuracy": linear.accuracy(test_x, test_y),
        "source_ncc_accuracy": float((nearest == test_y).double().mean()),
    }


def hparams(run: PretrainRun) -> dict[str, Any]:
    """The settings by which runs are told apart."""
    return {
        "variant": run.variant or Path(run.out).name,
        "dataset": run.data.train,
        "loss": run.loss.kind,
        "head": run.model.head.kind,
        "classifier": run.model.classifier.kind,
        "backbone": run.model.backbone.name,
        "lr": run.optim.lr,
        "weight_decay": run.optim.weight_decay,
        "epochs": run.epochs,
        "seed": run.seed,
    }
