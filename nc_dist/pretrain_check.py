"""All that can be wrong with a pre-training run, found before it starts, and its plan. For the launchers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nc_dist import pretrained
from nc_dist.checkpoint.checks import check_checkpoints
from nc_dist.config import PretrainRun
from nc_dist.data.catalog import open_source
from nc_dist.data.checks import check_samples
from nc_dist.data.mix import check_mix
from nc_dist.data.order import check_world
from nc_dist.engine import DeepSpeedSpec, deepspeed_json
from nc_dist.engine_check import check_engine, check_optim
from nc_dist.errors import InputError
from nc_dist.losses import Loss
from nc_dist.model import Model, ModelSpec, check_input
from nc_dist.model_cost import optimizer_bytes
from nc_dist.plan import Cluster, notes, training_plan
from nc_dist.plan_memory import checkpoint_bytes
from nc_dist.pretrain_plan import cluster_plan
from nc_dist.profiling import steps_of
from nc_dist.source_set import open_source_set, shards_to_read


def check(run: PretrainRun, world_size: int, cluster: Cluster | None = None) -> dict[str, Any]:
    """The plan of the run; InputError for all that can be wrong with its data, model and world size.

    With `cluster`, what the run would take of it is a part of the plan.
    """
    check_terms(run)
    check_optim(run.optim, run.engine)
    data = open_source_set(run)
    steps_of(run.profile.steps, data.steps)
    check_world(data.order.micro_per_step, world_size)
    cuda = torch.cuda.is_available() or bool(run.launch.gpus) or bool(cluster and cluster.gpu)
    check_engine(run.engine, cuda, run.batch_norm, data.order.micro_per_step // world_size)
    classes = len(data.source.class_names) if run.loss.uses_logits else 0
    parameters = check_input(run.model, run.input, classes, run.batch.micro * run.loss.views)
    if run.data.test:
        test = open_source(run.data.test, "test", run.data)
        if test.class_names != data.source.class_names:
            raise InputError(f"data.test={run.data.test!r}: its classes are not those of data.train={run.data.train!r}")
        if test.identity() == data.identity:
            raise InputError(f"data.test={run.data.test!r}: the very samples of data.train; name another split")
        check_samples(test, range(len(test.labels)), run.data.bad_samples)
    seen = check_samples(data.source, np.concatenate([data.train, data.heldout]), run.data.bad_samples)
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
    if cluster is None or cluster.world is None:  # the disk of a cluster that one does not have is not here
        plan |= check_checkpoints(run, data, checkpoint_size(run, parameters))
    if run.model.backbone.weights is not None:
        plan["weights"] = "those of the checkpoint" if "begins at" in plan else pretrained.report(run.model.backbone)
    plan |= {**shards_to_read(data, world_size), **notes({"train": data.about})}
    if cluster is not None:
        plan |= cluster_plan(run, data, cluster, world_size)
    if isinstance(run.engine, DeepSpeedSpec):
        trained = trained_parameters(run.model, classes)
        plan["DeepSpeed"] = deepspeed_json(run.engine, run.batch.global_, run.batch.micro, world_size, trained, cuda)
    return plan


def trained_parameters(spec: ModelSpec, classes: int) -> int:
    """How many numbers are trained; allocates nothing."""
    bare = spec.model_copy(update={"backbone": spec.backbone.model_copy(update={"weights": None})})
    with torch.device(spec.backbone.checked_on):
        return sum(p.numel() for p in Model(bare, classes).parameters() if p.requires_grad)


def checkpoint_size(run: PretrainRun, parameters: int) -> int:
    """Bytes of a checkpoint, the classifier's share left out."""
    element = 8 if run.engine.precision == "fp64" else 4
    moments = optimizer_bytes(run.optim, element)
    return checkpoint_bytes(parameters, parameters, moments, 0, ema=bool(run.ema), element=element)


def check_terms(run: PretrainRun) -> None:
    """InputError where loss, regularisers, mixing and classifier do not go together."""
    check_classifier(run.loss, run.model)
    kinds = set()
    for term in (run.loss, *run.regularisers):
        check_mix(run.data.mix, term)
        if term.kind in kinds:
            raise InputError(f"{term.named}: given twice, and both would be logged as one; leave one out")
        kinds.add(term.kind)


def check_classifier(loss: Loss, model: ModelSpec) -> None:
    """InputError where the loss needs another kind of classifier, or has none and a kind was asked for."""
    kind = model.classifier.kind
    if loss.classifier not in (None, kind):
        raise InputError(
            f"model.classifier.kind={kind!r}: {loss.named} needs the logits of a {loss.classifier} classifier; "
            f"set model.classifier.kind={loss.classifier}, or another loss, such as loss.kind=ce"
        )
    if not loss.uses_logits and kind != "linear":
        raise InputError(
            f"model.classifier.kind={kind!r}: {loss.named} has no classifier; "
            "leave model.classifier out, or take a loss of logits, such as loss.kind=ce"
        )
