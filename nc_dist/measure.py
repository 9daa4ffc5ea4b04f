"""The measuring journey: a model from anywhere, or all checkpoints of a run, at every block in one forward."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nc_dist import moments_file
from nc_dist.collapse import Collapse, Probe, collapse, forwarded
from nc_dist.config import MeasureRun
from nc_dist.data.catalog import open_source
from nc_dist.data.source import check_samples
from nc_dist.data.stream import Batch, eval_batches
from nc_dist.data.subset import per_class
from nc_dist.engine import evaluating
from nc_dist.errors import InputError, Preempted
from nc_dist.identity import hash_text
from nc_dist.layer_figure import layer_figure
from nc_dist.nc import Classifier, Moments, NotFinite
from nc_dist.subject import Subject, open_subject, subject_paths
from nc_dist.tracking import Tracker, flat_nc, nc_warnings
from nc_dist.world import World

MOMENTS = "moments.safetensors"
TELL_EVERY = 10.0  # seconds between signs of life


def check(run: MeasureRun, world_size: int) -> dict[str, Any]:
    """The plan of the run; InputError for all that can be wrong with models, data and the reference."""
    probe = open_probe(run)
    paths = subject_paths(run.model)
    for path in paths:
        subject = open_subject(path, run.weights, run.input)
        names = check_blocks(subject, run.blocks)
    reference_of(run, probe)
    dims = [block.dim for block in subject.blocks if block.name in names]
    dims += [subject.dim] if subject.headless else [subject.dim, subject.embedding_dim]
    wanted = 4 * sum(dims) * -(-len(probe.positions) // world_size)
    seen = check_samples(probe.source, probe.positions)
    return {
        "models": len(paths),
        "samples": len(probe.positions),
        "blocks": names,
        "features for the second pass": f"{wanted / 1e9:.3g} GB a rank, "
        + ("cached" if wanted <= run.cache_gb * 1e9 else "more than cache_gb: a second forward takes their place"),
        "images read and decoded as a check": seen,
    }


def measure(run: MeasureRun, world: World, stop: Callable[[], bool]) -> dict[str, Any]:
    """The journey: NC of each model on the data, before and after its head and at the named blocks.

    Every model gets nc.json, nc.csv, layers.svg and its moments file; those of a glob lie in folders of their own.
    """
    began, out = time.time(), Path(run.out)
    probe = open_probe(run)
    reference = reference_of(run, probe)
    paths = subject_paths(run.model)
    tracker = Tracker(out, world)
    measured: list[dict[str, Any]] = []
    for path in paths:
        subject = open_subject(path, run.weights, run.input)
        place_in_run = f"model {len(measured) + 1}/{len(paths)}"
        try:
            found = measure_subject(run, subject, probe, reference, world, stop, partial(_tell, tracker, place_in_run))
        except NotFinite as error:
            raise InputError(f"model={path}: {error}") from None
        nc = found.by_place(subject.headless)
        measured.append({"model": path, "step": subject.step, **subject.about, "nc": nc})
        if world.rank == 0:
            folder = out / Path(path).name if len(paths) > 1 else out
            write(folder, run, subject, probe, found, nc)
        tracker.scalars(
            subject.step or len(measured) - 1, flat_nc("", nc), model=path, **nc_warnings({Path(path).name: nc})
        )
    tracker.close()
    nc = measured[-1]["nc"]
    if world.rank == 0 and len(paths) > 1:
        write_table(out, [(Path(row["model"]).name, row["nc"]) for row in measured])
    return {
        "journey": "measure",
        "model": run.model,
        "data": run.data,
        "data_identity": probe.source.identity(),
        "per_class": run.per_class,
        "nc1": nc["before"]["nc1"],
        "nc": nc,
        "measured": [{**row, "nc": {"before": row["nc"]["before"]}} for row in measured],
        "cached_bytes": found.cached_bytes,
        "world_size": world.size,
        "device": world.device_name,
        "seconds": time.time() - began,
    }


def measure_subject(
    run: MeasureRun,
    subject: Subject,
    probe: Probe,
    reference: Mapping[str, Moments] | None,
    world: World,
    stop: Callable[[], bool],
    tell: Callable[[int, int], None],
) -> Collapse:
    """One model on the samples, fp32 and no TF32 unless the run says otherwise; `tell(images, of all)` meanwhile."""
    names = check_blocks(subject, run.blocks)
    module = subject.module.to(world.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.precision == "tf32"
    half = torch.autocast(world.device.type, torch.bfloat16) if run.precision == "bf16" else nullcontext()

    def forward_pass() -> Iterator[Any]:
        loaded = eval_batches(probe.source, probe.positions, subject.input, run.batch, world, run.workers)
        batches = until(stop, told(loaded, len(probe.positions), world, tell), world)
        return forwarded(lambda x: subject.observe(x, names), batches, subject.input, torch.float32, subject.headless)

    with evaluating(module), half:
        return collapse(
            forward_pass,
            probe,
            world,
            classifiers_of(subject, probe),
            reference=reference,
            rank_per_class=run.rank_per_class,
            cache_bytes=run.cache_gb * 1e9,
        )


def open_probe(run: MeasureRun) -> Probe:
    """The samples that are measured."""
    source = open_source(run.data, run.split)
    return Probe(source, per_class(source.labels, run.per_class, run.seed), run.seed)


def classifiers_of(subject: Subject, probe: Probe) -> dict[str, Classifier]:
    """The classifier by the place it acts on; none where it knows other classes than the data."""
    layer = subject.classifier
    if layer is None or layer.out_features != probe.num_classes:
        return {}
    bias = None if layer.bias is None else layer.bias.detach().float()
    return {"after": (layer.weight.detach().float(), bias)}


def reference_of(run: MeasureRun, probe: Probe) -> Mapping[str, Moments] | None:
    """The moments whose means are used besides; InputError unless they are of the data's classes."""
    if run.reference is None:
        return None
    try:
        loaded = moments_file.load(Path(run.reference))
    except (OSError, ValueError) as error:
        raise InputError(f"reference={run.reference!r}: {error}") from None
    if loaded.about.get("class_names") != probe.source.class_names:
        raise InputError(f"reference={run.reference!r}: of other classes than data={run.data!r}")
    return loaded.places


def until(stop: Callable[[], bool], batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """The batches, until any rank is asked to stop: then Preempted on all of them."""
    for batch in batches:
        if world.sum_(torch.tensor(float(stop()), device=world.device)):
            raise Preempted(0)
        yield batch


def told(batches: Iterable[Batch], total: int, world: World, tell: Callable[[int, int], None]) -> Iterator[Batch]:
    """The batches; rank 0 tells every TELL_EVERY seconds how far all ranks are, which go on side by side."""
    done, last = 0, time.monotonic()
    for batch in batches:
        yield batch
        done += len(batch.labels) * world.size
        if time.monotonic() - last >= TELL_EVERY:
            last = time.monotonic()
            tell(min(done, total), total)


def _tell(tracker: Tracker, which: str, images: int, total: int) -> None:
    tracker.scalars(0, {}, measured=which, images=images, of=total, time=time.time())


def check_blocks(subject: Subject, blocks: Sequence[str]) -> list[str]:
    """The names of the blocks that are to be measured ("all": every one); InputError lists those there are."""
    names = [block.name for block in subject.blocks]
    unknown = [] if blocks == "all" else [name for name in blocks if name not in names]
    if unknown:
        raise InputError(f"blocks: no such block {unknown[0]!r}; {run_name(subject)} has {', '.join(names)}")
    return names if blocks == "all" else list(blocks)


def run_name(subject: Subject) -> str:
    """What the model is called in messages."""
    return str(subject.about.get("model", "this model"))


def write(
    folder: Path, run: MeasureRun, subject: Subject, probe: Probe, found: Collapse, nc: Mapping[str, Any]
) -> None:
    """nc.json, nc.csv, layers.svg and the moments file of one model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nc.json").write_text(json.dumps(nc, indent=1))
    write_table(folder, [(None, nc)])
    layer_figure(found.metrics, folder / "layers.svg", f"{run_name(subject)} on {run.data}")
    subset = hash_text(json.dumps(probe.positions.tolist()))
    data = {"name": run.data, "identity": probe.source.identity(), "subset": subset, "samples": len(probe.positions)}
    about = {
        "class_names": probe.source.class_names,
        "model": {"name": run_name(subject), "identity": subject.identity, "step": subject.step},
        "data": [data],
        "input": subject.input.model_dump(mode="json"),
        "pooling": {block.name: block.pooling for block in subject.blocks},
        "headless": subject.headless,
        "precision": run.precision,
    }
    moments_file.save(folder / MOMENTS, moments_file.MomentsFile(found.moments, classifiers_of(subject, probe), about))


def write_table(folder: Path, models: Sequence[tuple[str | None, Mapping[str, Any]]]) -> None:
    """nc.csv: a row for each place (of each model); what has no value is left empty."""
    rows = [
        {**({"model": model} if model else {}), "place": place, **values}
        for model, nc in models
        for place, values in nc.items()
        if isinstance(values, dict)
    ]
    columns = [key for key, value in rows[0].items() if not isinstance(value, dict | list)]
    with (folder / "nc.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
