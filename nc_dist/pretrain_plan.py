"""What a pre-training run would take of a cluster, whether one has it or not: for --dry-run.

Memory, traffic, work, time and disk are arithmetic (plan_*.py) on what the model takes (model_cost.py).
"""

from __future__ import annotations

import numpy as np
import torch

from nc_dist.config import PretrainRun
from nc_dist.data.catalog import open_source
from nc_dist.engine import DeepSpeedSpec, deepspeed_json
from nc_dist.gpus import Gpu, gpu, recognised
from nc_dist.model_cost import ModelCost, model_cost, optimizer_bytes
from nc_dist.plan import Cluster, as_bytes, as_flops
from nc_dist.plan_memory import (
    DDP_BUCKETS,
    Stage,
    ZeroSettings,
    checkpoint_bytes,
    checkpoints_kept,
    export_bytes,
    states,
    zero_settings,
)  # fmt: skip
from nc_dist.plan_time import ATTENTION_MFU, CONVOLUTION_MFU, Work, gpu_hours, intervals, steps_with, work
from nc_dist.plan_traffic import sent_in_a_step
from nc_dist.source_set import SourceSet

SCALAR_BYTES = 110  # of one number in metrics.jsonl and TensorBoard's file together, measured on small runs
SCALARS_A_STEP, SCALARS_A_MEASURE = 14, 160  # twice the latter with averaged weights


def cluster_plan(run: PretrainRun, data: SourceSet, cluster: Cluster, world: int) -> dict[str, str]:
    """Lines of the plan: {what: how much}. Raises InputError for a GPU that is not known."""
    classes = len(data.source.class_names) if run.loss.uses_logits else 0
    images = run.batch.micro * run.loss.views
    cost = model_cost(run.model, classes, run.input, images, run.engine.precision)
    device = gpu(cluster.gpu) if cluster.gpu else _own_gpu()
    done = work_of(run, data, cost, world)
    return {
        "model": f"{cost.parameters:,} parameters, {as_flops(cost.flops)} a forward of one image",
        **memory_lines(run, cost, device, cluster, world),
        **_work_lines(run, done, cost, device, world),
        **disk_lines(run, data, cost),
    }


def _own_gpu() -> Gpu | None:
    return recognised(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def stages_of(run: PretrainRun, trained: int, gpu: bool, world: int) -> dict[Stage, ZeroSettings]:
    """All ways to share the states out, with the run's own settings where they apply."""
    engine = run.engine if isinstance(run.engine, DeepSpeedSpec) else DeepSpeedSpec()
    found: dict[Stage, ZeroSettings] = {DDP_BUCKETS: ZeroSettings()}
    for stage in (0, 1, 2, 3):
        allowed = {"offload_optimizer": engine.offload_optimizer and stage > 0}
        allowed["offload_parameters"] = engine.offload_parameters and stage == 3
        spec = engine.model_copy(update={"zero": stage, **allowed})
        json = deepspeed_json(spec, run.batch.global_, run.batch.micro, world, trained, gpu)
        found[stage] = zero_settings(json["zero_optimization"])
    return found


def stage_of(run: PretrainRun) -> Stage:
    """That of the run itself."""
    return run.engine.zero if isinstance(run.engine, DeepSpeedSpec) else DDP_BUCKETS


def memory_lines(run: PretrainRun, cost: ModelCost, device: Gpu | None, cluster: Cluster, world: int) -> dict[str, str]:
    """A row of memory and traffic for each stage; which one is the run's own, and whether it fits."""
    element = 8 if run.engine.precision == "fp64" else 4
    moments = optimizer_bytes(run.optim, element)
    accumulated = run.batch.global_ // run.batch.micro // world
    activations = cost.recomputed if run.engine.recompute else cost.activations
    heads = ("weights", "gradients", "optimiser", "buckets", "activations", "at most", "in RAM", "sent")
    lines = {"bytes a process": "".join(f"{head:>12}" for head in heads)}
    for stage, zero in stages_of(run, sum(cost.trained), device is not None, world).items():
        held = states(
            stage, cost.trained, moments, world, zero, rest=element * cost.frozen + cost.buffers,
            ema=bool(run.ema), element=element,
        )  # fmt: skip
        most = held.peak(activations)
        sent = sent_in_a_step(stage, cost.trained, world, accumulated, zero, element)
        sizes = (
            held.parameters + held.average, held.gradients, held.optimizer, held.buckets, activations, most,
            held.on_cpu, sent,
        )  # fmt: skip
        own = stage == stage_of(run)
        name = "torch, DDP" if stage == DDP_BUCKETS else f"ZeRO {stage}"
        lines[f"  {name}{' <- this run' if own else ''}"] = "".join(f"{as_bytes(size):>12}" for size in sizes)
        if own:
            own_most, own_sent = most, sent
    lines["of the table"] = (
        "weights with averages; `at most` in backward or update, without CUDA's context and workspaces; `in RAM` with "
        "offload; `sent` in a step"
    )
    if device is not None:
        fits = "fits" if own_most < 0.9 * device.memory_gb * 1e9 else "does not fit, or barely"
        lines["memory of the GPU"] = f"{device.memory_gb:g} GB ({device.name}): the run {fits}"
    if cluster.nodes > 1 and own_sent:
        # A ring through all processes, node after node, crosses each node's edge once: NCCL may use more rings, each
        # with its part of the data.
        lines["bytes that leave a node in a step"] = f"{as_bytes(own_sent)}, once around a ring"
    return lines


def measured_at(run: PretrainRun, data: SourceSet) -> tuple[set[int], set[int]]:
    """Steps after which NC is measured, and those after which a checkpoint is saved."""
    measure, save = intervals(run.measure_every, run.save_every, data.steps, data.order.steps_per_epoch)
    saves = steps_with(save, data.steps)
    return {*range(measure, data.steps + 1, measure), *saves}, saves


def work_of(run: PretrainRun, data: SourceSet, cost: ModelCost, world: int) -> Work:
    """FLOPs of the run: training, what is done twice, the probes."""
    measures = 1 + len(measured_at(run, data)[0])
    final = 0
    if run.data.test:
        kept = np.concatenate([data.train, data.heldout])
        final = _probe_size(data, kept, run.probe.source_per_class)
        final += len(open_source(run.data.test, "test", run.data).labels)
    coupled = any(term.coupled for term in (run.loss, *run.regularisers))
    return work(
        forward=cost.flops,
        steps=data.steps,
        batch=run.batch.global_,
        views=run.loss.views,
        recompute=run.engine.recompute,
        cached=coupled and run.batch.global_ > run.batch.micro * world,
        attack_steps=run.adversary.steps if run.adversary.kind == "pgd" else 0,
        measures=measures * (2 if run.ema else 1),
        probe_images=sum(_probe_size(data, part, run.probe.per_class) for part in (data.train, data.heldout)),
        final_images=final * (2 if run.ema else 1),
    )


def _probe_size(data: SourceSet, positions: np.ndarray, per_class: int | None) -> int:
    counts = np.bincount(data.source.labels[positions])
    return int(counts.sum() if per_class is None else np.minimum(counts, per_class).sum())


def _work_lines(run: PretrainRun, done: Work, cost: ModelCost, device: Gpu | None, world: int) -> dict[str, str]:
    lines = {
        "work": f"{as_flops(done.training)} training, {as_flops(done.repeated)} forwards done again, "
        f"{as_flops(done.probes)} NC probes, {as_flops(done.final)} source accuracy",
        "NC probe": f"{100 * done.probes / done.training:.2f} % of the work of training",
    }
    if device is not None:
        peak, assumed = device.peak(run.engine.precision), ATTENTION_MFU if cost.attention else CONVOLUTION_MFU
        hours = gpu_hours(done.total, peak, assumed)
        lines["GPU-hours"] = (
            f"{hours:.3g}, or {hours / world:.3g} hours on {world}, if {100 * assumed:.0f} % of {as_flops(peak)}/s "
            f"({device.name}, {run.engine.precision}) are reached: "
            "assumed, not measured; slow data and small images take longer"
        )
    else:
        lines["GPU-hours"] = "unknown without a GPU: --gpu names one"
    return lines


def disk_lines(run: PretrainRun, data: SourceSet, cost: ModelCost) -> dict[str, str]:
    """Disk of the run's folder at most: checkpoints that are kept, the export, curves."""
    element = 8 if run.engine.precision == "fp64" else 4
    moments = optimizer_bytes(run.optim, element)
    measures, saves = measured_at(run, data)
    one = checkpoint_bytes(
        cost.parameters, sum(cost.trained), moments, cost.buffers, ema=bool(run.ema), element=element
    )
    chosen = [max(1, round(epoch * data.order.steps_per_epoch)) for epoch in run.keep_epochs]
    kept = checkpoints_kept(sorted(saves | set(chosen)), run.keep, chosen)
    curves = (len(measures) * SCALARS_A_MEASURE + data.steps // run.log_every * SCALARS_A_STEP) * SCALAR_BYTES
    export = export_bytes(cost.parameters, cost.buffers, element) * (2 if run.ema else 1)
    return {
        "disk": f"{as_bytes(kept * one + export + curves)}: {kept} checkpoints of {as_bytes(one)} at most at a time, "
        f"export {as_bytes(export)}, curves {as_bytes(curves)}"
    }
