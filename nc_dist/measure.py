"""Neural collapse over a loader, exact over ranks: used live by both training journeys, and a journey of its own.

Letters: B batch, N samples of this rank, D feature dimensions, K classes.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nc_dist.config import MeasureRun
from nc_dist.data.augment import InputSpec, normalise
from nc_dist.data.catalog import open_source
from nc_dist.data.source import check_samples
from nc_dist.data.stream import Batch, eval_batches
from nc_dist.data.subset import per_class
from nc_dist.engine import evaluating
from nc_dist.errors import InputError, Preempted
from nc_dist.loop import full
from nc_dist.model import Model, Outputs, load_exported
from nc_dist.nc import ClassMoments, nc4, ncc_hits
from nc_dist.nc.metrics import Undefined, nc1, summary
from nc_dist.world import World

NULL_DRAWS = 5  # permutations of the labels behind `nc1_null`
CHUNK = 4096  # rows of a second pass

Observe = Callable[[Tensor], tuple[Outputs, dict[str, Tensor]]]


@dataclass(frozen=True)
class Observed:
    """This rank's part of a probe: features (N, D) by place, labels (N,), and how many logits were right (-1: none)."""

    features: dict[str, Tensor]
    labels: Tensor
    hits: int


def observe(forward: Observe, batches: Iterable[Batch], input: InputSpec, dtype: torch.dtype) -> Observed:
    """Run a probe once; places are the named blocks, `before` the head and `after` it."""
    features: dict[str, list[Tensor]] = {}
    labels, hits = [], -1
    for batch in batches:
        outputs, blocks = forward(normalise(batch.images, input, dtype))
        places = {**blocks, "before": outputs.features_Bd, "after": outputs.embedding_BE}
        for place, feats in places.items():
            features.setdefault(place, []).append(full(feats.detach()))
        labels.append(batch.labels)
        if outputs.logits_BK is not None:
            hits = max(hits, 0) + int((outputs.logits_BK.argmax(1) == batch.labels).sum())
    return Observed({place: torch.cat(parts) for place, parts in features.items()}, torch.cat(labels), hits)


def collapse(
    feats_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    world: World,
    classifier: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Any]:
    """Every NC metric of the features of all ranks, the same on each of them; see nc/metrics.py for the names.

    `classifier` is (weight (K, D), bias (K,)) where it acts on these very features. Besides the moments' metrics:
    nc4, ncc_acc1 (nearest class centre) and nc1_null, the mean NC1 under permuted labels: what pure noise would give.
    """
    stats = _moments(feats_ND, labels_N, num_classes, world).statistics()
    values: dict[str, Any] = summary(stats, *(classifier or (None, None)))
    counts = torch.zeros(3, dtype=torch.float64, device=feats_ND.device)
    if values["N"]:
        for feats, labels in zip(torch.split(feats_ND, CHUNK), torch.split(labels_N, CHUNK), strict=True):
            right, _ = ncc_hits(feats, labels, stats)
            agree, _ = nc4(feats, stats, *classifier) if classifier else (0, 0)
            counts += torch.tensor([right, agree, len(labels)], dtype=torch.float64, device=counts.device)
    right, agree, total = world.sum_(counts).tolist()
    values["ncc_acc1"] = right / total if total else None
    values["nc4"] = agree / total if classifier and total else None
    values["nc1_null"] = _null(feats_ND, labels_N, num_classes, world)
    return values


def _moments(feats_ND: Tensor, labels_N: Tensor, num_classes: int, world: World) -> ClassMoments:
    moments = ClassMoments(num_classes, feats_ND.shape[1], device=feats_ND.device)
    for feats, labels in zip(torch.split(feats_ND, CHUNK), torch.split(labels_N, CHUNK), strict=True):
        # In fp64: fp32 products differ by 1e-7 with the split over ranks, which the pseudo-inverse in NC1 may amplify.
        moments.update(feats.double(), labels)
    return moments.all_reduce(world.sum_)


def _null(feats_ND: Tensor, labels_N: Tensor, num_classes: int, world: World) -> float | None:
    """Mean NC1 over seeded permutations of the labels of all ranks."""
    parts = world.gather_objects(labels_N.cpu())
    labels, start = torch.cat(parts), sum(len(part) for part in parts[: world.rank])
    values = []
    for draw in range(NULL_DRAWS):
        shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))]
        mine = shuffled[start : start + len(labels_N)].to(labels_N.device)
        try:
            values.append(nc1(_moments(feats_ND, mine, num_classes, world).statistics()).value)
        except Undefined:
            return None
    return sum(values) / len(values)


def measure_probe(
    forward: Observe, model: Model, batches: Iterable[Batch], input: InputSpec, dtype: torch.dtype, world: World,
    classes: int, classifier: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:  # fmt: skip
    """NC at every observed place, and `acc1` where there is a classifier, over all ranks.

    Without a head, `before` and `after` are the same features: they are measured once.
    """
    observed = observe(forward, batches, input, dtype)
    headless = model.embedding_dim == model.dim and not list(model.head.parameters())
    results: dict[str, Any] = {}
    for place, feats in observed.features.items():
        if place == "before" and headless:
            continue
        results[place] = collapse(feats, observed.labels, classes, world, classifier if place == "after" else None)
    if headless:
        results["before"] = results["after"]
    if classifier is not None:
        sums = world.sum_(torch.tensor([observed.hits, len(observed.labels)], dtype=torch.float64, device=world.device))
        results["acc1"] = float(sums[0] / sums[1].clamp(min=1))
    return results


def classifier_of(model: Model) -> tuple[Tensor, Tensor] | None:
    """A copy of the classifier's weight and bias."""
    if model.classifier is None:
        return None
    return model.classifier.weight.detach().float().clone(), model.classifier.bias.detach().float().clone()


def check(run: MeasureRun, world_size: int) -> dict[str, Any]:
    """The plan of the run; InputError for all that can be wrong with model and data."""
    blocks = check_blocks(load_exported(run.model).model, run.blocks)
    source = open_source(run.data, run.split)
    positions = per_class(source.labels, run.per_class, run.seed)
    seen = check_samples(source, positions)
    return {"samples": len(positions), "blocks": blocks, "images read and decoded as a check": seen}


def measure(run: MeasureRun, world: World, stop: Callable[[], bool]) -> dict[str, Any]:
    """The journey: NC of an exported model on a data set, before and after the head and at the named blocks."""
    began = time.time()
    exported = load_exported(run.model)
    model = exported.model.to(world.device)
    source = open_source(run.data, run.split)
    classes = len(source.class_names)
    names = check_blocks(model, run.blocks)
    positions = per_class(source.labels, run.per_class, run.seed)
    batches = until(stop, eval_batches(source, positions, exported.input, run.batch, world), world)
    fits = model.num_classes == classes
    classifier = classifier_of(model) if fits else None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with evaluating(model):
        nc = measure_probe(
            lambda x: model.observe(x, names),
            model,
            batches,
            exported.input,
            torch.float32,
            world,
            classes,
            classifier,
        )
    result: dict[str, Any] = {
        "journey": "measure",
        "model": run.model,
        "data": run.data,
        "data_identity": source.identity(),
        "per_class": run.per_class,
        "nc1": nc["before"]["nc1"],
        "nc": nc,
        "world_size": world.size,
        "device": world.device_name,
        "seconds": time.time() - began,
    }
    if world.rank == 0:
        _write(Path(run.out), result)
    return result


def until(stop: Callable[[], bool], batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """The batches, until any rank is asked to stop: then Preempted on all of them."""
    for batch in batches:
        if world.sum_(torch.tensor(float(stop()), device=world.device)):
            raise Preempted(0)
        yield batch


def check_blocks(model: Model, blocks: Sequence[str]) -> list[str]:
    """The names of the blocks that are to be measured ("all": every one); InputError lists those there are."""
    names = [block.name for block in model.blocks] if blocks == "all" else list(blocks)
    for name in names:
        try:
            model.backbone.index(name)
        except ValueError as error:
            raise InputError(f"blocks: {error}") from None
    return names


def _write(out: Path, result: dict[str, Any]) -> None:
    (out / "nc.json").write_text(json.dumps(result["nc"], indent=1))
    rows = [{"place": place, **values} for place, values in result["nc"].items() if isinstance(values, dict)]
    columns = [key for key in rows[0] if key != "reasons"]
    with (out / "nc.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
