"""All that can be wrong with a pre-training run, found before it starts, and its plan. For the launchers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nc_dist import initial_weights
from nc_dist.checkpoint.checks import check_checkpoints
from nc_dist.config import PretrainRun
from nc_dist.data.catalog import Opened, open_set
from nc_dist.data.catalog.published import Published, open_or_published
from nc_dist.data.checks import check_samples
from nc_dist.data.mix import check_mix
from nc_dist.data.order import check_world
from nc_dist.data.source import Source
from nc_dist.engine import DeepSpeedSpec, deepspeed_json
from nc_dist.engine.checks import check_engine, check_optim
from nc_dist.errors import InputError
from nc_dist.heads import CosineClassifier
from nc_dist.losses import Loss
from nc_dist.model import ModelSpec, check_input
from nc_dist.plan import Cluster, notes, training_plan
from nc_dist.plan.model_cost import model_size
from nc_dist.pretrain_plan import checkpoint_size, cluster_plan
from nc_dist.profiling import steps_of
from nc_dist.source_set import SourceSet, logit_classes, open_source_set, shards_to_read


def check(run: PretrainRun, world_size: int, cluster: Cluster | None = None) -> dict[str, Any]:
    """The plan of the run; InputError for all that can be wrong with its data, model and world size.

    With `cluster`, what the run would take of it is a part of the plan.
    """
    check_terms(run)
    check_optim(run.optim, run.engine)
    published = cluster not in (None, Cluster())  # a cluster that one does not have: nor, maybe, the data
    data = open_source_set(run, published)
    steps_of(run.profile.steps, data.steps)
    check_world(data.order.micro_per_step, world_size)
    cuda = torch.cuda.is_available() or bool(run.launch.gpus) or bool(cluster and cluster.gpu)
    check_engine(run.engine, cuda, run.batch_norm, data.order.micro_per_step // world_size)
    classes = logit_classes(run, data.source.class_names)
    parameters = check_input(run.model, run.input, classes, run.batch.micro * run.loss.views)
    test = _test_set(run, data, published)
    seen = _read_some(data.source, np.concatenate([data.train, data.heldout]), run.data.bad_samples)
    plan = training_plan(
        samples=len(data.train),
        heldout=len(data.heldout),
        global_batch=run.batch.global_,
        micro=run.batch.micro,
        lanes=data.order.lanes,
        steps=data.steps,
        world=world_size,
    )
    plan["parameters without classifier"] = parameters
    plan["images read and decoded as a check"] = seen
    size = model_size(run.model, classes, run.engine.precision)
    if cluster is None or cluster.world is None:  # the disk of a cluster that one does not have is not here
        plan |= check_checkpoints(run, data, checkpoint_size(run, size))
    if run.model.backbone.weights is not None:
        plan["weights"] = (
            "those of the checkpoint" if "begins at" in plan else initial_weights.report(run.model.backbone)
        )
    sets = {"train": data.about} | ({"test": test.about()} if test else {})
    plan |= {**shards_to_read(data, world_size), **notes(sets)}
    if cluster is not None:
        plan |= cluster_plan(run, data, cluster, world_size, len(test.source.labels) if test else 0)
    if isinstance(run.engine, DeepSpeedSpec):
        batch = (run.batch.global_, run.batch.micro)
        plan["DeepSpeed"] = deepspeed_json(run.engine, *batch, world_size, sum(size.trained), cuda)
    return plan


def _test_set(run: PretrainRun, data: SourceSet, published: bool) -> Opened | None:
    """None without one; InputError unless it has the classes of the training set, and other samples."""
    if run.data.test is None:
        return None
    opened = (open_or_published if published else open_set)(run.data.test, "test", run.data)
    test, ours, theirs = opened.source, data.source.class_names, opened.source.class_names
    if isinstance(test, Published) or isinstance(data.source, Published):
        agree = len(ours) == len(theirs)  # what the classes are called is not published
    else:
        agree = ours == theirs
    if not agree:
        raise InputError(f"data.test={run.data.test!r}: its classes are not those of data.train={run.data.train!r}")
    if test.identity() == data.identity:
        raise InputError(f"data.test={run.data.test!r}: the very samples of data.train; name another split")
    _read_some(test, np.arange(len(test.labels)), run.data.bad_samples)
    return opened


def _read_some(source: Source, positions: np.ndarray, tolerated: int) -> str:
    return "none" if isinstance(source, Published) else check_samples(source, positions, tolerated)


def check_terms(run: PretrainRun) -> None:
    """InputError where loss, regularisers, mixing and classifier do not go together."""
    check_classifier(run.loss, run.model)
    kinds = set()
    for term in (run.loss, *run.regularisers):
        check_mix(run.data.mix, term)
        if term.kind in kinds:
            raise InputError(f"{term.named}: given twice, and both would be logged as one; leave one out")
        kinds.add(term.kind)
        key, samples = ("global", run.batch.global_) if term.coupled else ("micro", run.batch.micro)
        if samples * term.views < term.least:
            raise InputError(f"batch.{key}={samples}: {term.named} compares at least {term.least} samples; raise it")


def check_classifier(loss: Loss, model: ModelSpec) -> None:
    """InputError where the loss needs another kind of classifier, or has none and a kind was asked for."""
    kind = model.classifier.kind
    if loss.classifier not in (None, kind):
        raise InputError(
            f"model.classifier.kind={kind!r}: {loss.named} needs the logits of a {loss.classifier} classifier; "
            f"set model.classifier.kind={loss.classifier}, or another loss, such as loss.kind=ce"
        )
    if isinstance(model.classifier, CosineClassifier) and loss.classifier == kind and model.classifier.scale != 1:
        raise InputError(
            f"model.classifier.scale={model.classifier.scale:g}: {loss.named} has its own temperature, by which "
            "cosines are divided; leave the scale at 1 and set loss.temperature"
        )
    if not loss.uses_logits and kind != "linear":
        raise InputError(
            f"model.classifier.kind={kind!r}: {loss.named} has no classifier; "
            "leave model.classifier out, or take a loss of logits, such as loss.kind=ce"
        )
