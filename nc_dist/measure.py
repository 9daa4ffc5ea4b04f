"""The measuring journey: a model from anywhere, or all checkpoints of a run, at every block in one forward."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nc_dist import moments_file
from nc_dist.collapse import Collapse, collapse
from nc_dist.config import MeasureRun
from nc_dist.data.catalog import open_source
from nc_dist.data.checks import check_samples
from nc_dist.data.damage import BadSamples
from nc_dist.data.stream import Batch, eval_batches
from nc_dist.data.subset import per_class
from nc_dist.engine import evaluating
from nc_dist.errors import InputError, Preempted
from nc_dist.features import Probe, forwarded
from nc_dist.identity import hash_text
from nc_dist.measure_files import write, write_table
from nc_dist.moments_file import MomentsFile
from nc_dist.nc import Classifier, Moments, NotFinite
from nc_dist.subject import Subject, decoder_of, open_subject, subject_paths
from nc_dist.tracking import Tracker, flat_nc, nc_warnings
from nc_dist.world import World

TELL_EVERY = 10.0  # seconds between signs of life


def check(run: MeasureRun, world_size: int) -> dict[str, Any]:
    """The plan of the run; InputError for all that can be wrong with models, data and the reference."""
    probe = open_probe(run)
    paths = subject_paths(run.model)
    for path in paths:
        subject = open_subject(path, run.weights, run.input, run.seed)
        names = check_blocks(subject, run.blocks)
        reference_of(run, subject, probe)
    dims = [block.dim for block in subject.blocks if block.name in names]
    dims += [subject.dim] if subject.headless else [subject.dim, subject.embedding_dim]
    wanted = 4 * sum(dims) * -(-len(probe.positions) // world_size)
    ranked = int(probe.ranked(run.rank_per_class)[0].sum()) if run.rank_per_class else 0
    seen = check_samples(probe.source, probe.positions, run.bad_samples)
    return {
        "models": len(paths),
        "samples": len(probe.positions),
        "blocks": names,
        "features for the second pass": f"{wanted / 1e9:.3g} GB a rank, "
        + ("cached" if wanted <= run.cache_gb * 1e9 else "more than cache_gb: a second forward takes their place"),
        "features for the numerical rank": f"{4 * sum(dims) * ranked / world_size / 1e9:.3g} GB a rank, besides",
        "classifier": mismatch(subject, probe) or "acts on the data's classes",
        "weights": str(subject.about.get("match", subject.about["weights"])),
        "images read and decoded as a check": seen,
    }


def measure(run: MeasureRun, world: World, stop: Callable[[], bool]) -> dict[str, Any]:
    """The journey: NC of each model on the data, before and after its head and at the named blocks.

    Every model gets nc.json, nc.csv, layers.svg and its moments file; those of a glob lie in folders of their own.
    """
    began, out = time.time(), Path(run.out)
    probe = open_probe(run)
    bad = BadSamples(out, run.bad_samples, world, "bad_samples")
    paths = subject_paths(run.model)
    names = distinct_names(paths)
    tracker = Tracker(out, world)
    measured: list[dict[str, Any]] = []
    for path, name in zip(paths, names, strict=True):
        subject = open_subject(path, run.weights, run.input, run.seed)
        reference = reference_of(run, subject, probe, world.device)
        place_in_run = f"model {len(measured) + 1}/{len(paths)}"
        try:
            tell = partial(_tell, tracker, place_in_run)
            found = measure_subject(run, subject, probe, reference, world, stop, tell, bad)
        except NotFinite as error:
            raise InputError(f"model={path}: {error}") from None
        nc = explained(found.by_place(subject.headless), mismatch(subject, probe))
        measured.append({**_row(path, subject), "nc": nc})
        if world.rank == 0:
            file = MomentsFile(found.moments, classifiers_of(subject, probe), about_subject(run, subject, probe))
            write(out / name if len(paths) > 1 else out, f"{subject.about['model']} on {run.data}", nc, file)
        # Checkpoints of one run are steps of one curve; other models are curves of their own.
        curve = "" if len({Path(each).parent for each in paths}) == 1 else name.replace("/", "_")
        step = subject.step if subject.step is not None else len(measured) - 1
        tracker.scalars(step, flat_nc(curve, nc), model=path, **nc_warnings({name: nc}))
    tracker.close()
    nc = measured[-1]["nc"]
    if world.rank == 0 and len(paths) > 1:
        write_table(out, [(name, row["nc"]) for name, row in zip(names, measured, strict=True)])
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
        "bad_samples": len(bad),
        "world_size": world.size,
        "device": world.device_name,
        "seconds": time.time() - began,
    }


def _row(path: str, subject: Subject) -> dict[str, Any]:
    return {**subject.about, "model": path, "step": subject.step, "identity": subject.identity}


def changed(run: MeasureRun, result: dict[str, Any]) -> str | None:
    """Why the result is out of date: other checkpoints under the glob, or other weights under the same name."""
    try:
        now = {path: open_subject(path, run.weights, run.input, run.seed).identity for path in subject_paths(run.model)}
    except InputError:
        return None  # the models are gone: what was measured stays
    then = {row["model"]: row.get("identity") for row in result["measured"]}
    if now.keys() != then.keys():
        return f"model={run.model!r} now names {len(now)} models, then {len(then)}, not the same"
    other = [path for path in now if now[path] != then[path]]
    return f"{other[0]} has other weights now" if other else None


def measure_subject(
    run: MeasureRun,
    subject: Subject,
    probe: Probe,
    reference: Mapping[str, Moments] | None,
    world: World,
    stop: Callable[[], bool],
    tell: Callable[[int, int], None],
    bad: BadSamples,
) -> Collapse:
    """One model on the samples, fp32 and no TF32 unless the run says otherwise; `tell(images, of all)` meanwhile."""
    names = check_blocks(subject, run.blocks)
    module = subject.module.to(world.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.precision == "tf32"
    half = torch.autocast(world.device.type, torch.bfloat16) if run.precision == "bf16" else nullcontext()

    def forward_pass() -> Iterator[Any]:
        loaded = eval_batches(probe.source, probe.positions, subject.input, run.batch, world, run.workers, bad)
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
            rounded_to={"bf16": torch.bfloat16, "tf32": torch.float16}.get(run.precision),  # TF32 has fp16's mantissa
        )


def open_probe(run: MeasureRun) -> Probe:
    """The samples that are measured."""
    source = open_source(run.data, run.split, run.decided(decoder_of(subject_paths(run.model)[0])))
    return Probe(source, per_class(source.labels, run.per_class, run.seed), run.seed)


def classifiers_of(subject: Subject, probe: Probe) -> dict[str, Classifier]:
    """The classifier by the place it acts on; none where it knows other classes than the data."""
    linear = subject.linear_map()
    return {} if linear is None or mismatch(subject, probe) else {"after": linear}


def mismatch(subject: Subject, probe: Probe) -> str | None:
    """Why the classifier's metrics have no value on the data; None where they have."""
    if subject.classifier is None:
        return "no classifier"
    known, classes = subject.classifier.out_features, probe.num_classes
    if known != classes:
        return f"the classifier is of {known} classes, the data has {classes}"
    names = zip(subject.class_names or probe.source.class_names, probe.source.class_names, strict=True)
    other = next(((a, b) for a, b in names if a != b), None)
    return f"the classifier is of other classes: {other[0]!r} where the data has {other[1]!r}" if other else None


def explained(nc: dict[str, Any], why: str | None) -> dict[str, Any]:
    """The same, with the reason in place of the general one where a classifier was missed."""
    for place in ("before", "after"):
        reasons = nc[place]["reasons"]
        reasons.update({name: why for name, given in reasons.items() if why and given == "no classifier"})
    return nc


def reference_of(
    run: MeasureRun, subject: Subject, probe: Probe, device: torch.device | None = None
) -> Mapping[str, Moments] | None:
    """The moments whose means are used besides; InputError unless of the same model, input and classes."""
    if run.reference is None:
        return None
    try:
        loaded = moments_file.load(Path(run.reference))
    except (OSError, ValueError) as error:
        raise InputError(f"reference={run.reference!r}: {error}") from None
    ours, theirs = (
        {**about, "model": about.get("model", {}).get("identity")}
        for about in (about_subject(run, subject, probe), loaded.about)
    )
    for key in ("model", "input", "class_names"):
        if ours[key] != theirs.get(key):
            raise InputError(
                f"reference={run.reference!r}: its {key} is {theirs.get(key)}, that of this measurement {ours[key]}; "
                "measure this very model on the training samples first"
            )
    return {place: halved.to(device or "cpu") for place, halved in loaded.places.items()}


def distinct_names(paths: Sequence[str]) -> list[str]:
    """What to call each of several models: its path inside the folder that they share."""
    shared = os.path.commonpath([Path(path).absolute().parent for path in paths])
    return [os.path.relpath(Path(path).absolute(), shared) for path in paths]


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
        raise InputError(f"blocks: no such block {unknown[0]!r}; {subject.about['model']} has {', '.join(names)}")
    return names if blocks == "all" else list(blocks)


def about_subject(run: MeasureRun, subject: Subject, probe: Probe) -> dict[str, Any]:
    """What was measured, for the moments file."""
    subset = hash_text(json.dumps(probe.positions.tolist()))
    data = {"name": run.data, "identity": probe.source.identity(), "subset": subset, "samples": len(probe.positions)}
    data["packed"] = moments_file.packed(probe.positions.tolist(), len(probe.source.labels))
    return {
        "class_names": list(probe.source.class_names),
        "model": {"name": subject.about["model"], "identity": subject.identity, "step": subject.step},
        "data": [data],
        "input": {**subject.input.model_dump(mode="json"), "decoder": probe.source.decoder},
        "pooling": {block.name: block.pooling for block in subject.blocks},
        "headless": subject.headless,
        "precision": run.precision,
    }
