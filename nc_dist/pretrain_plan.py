"""What a pre-training run would take of a cluster, whether one has it or not: for --dry-run.

Memory, traffic, work, time and disk are the arithmetic of `plan` on what the model takes (plan/model_cost.py).
"""

from __future__ import annotations

import numpy as np
import torch

from nc_dist.checkpoint import retention_of
from nc_dist.config import PretrainRun
from nc_dist.objective import any_coupled
from nc_dist.plan import Cluster, as_bytes, as_flops
from nc_dist.plan.engines import every_stage, memory_of, stage_of
from nc_dist.plan.gpus import Gpu, gpu, recognised
from nc_dist.plan.memory import DDP_BUCKETS, checkpoint_bytes, checkpoints_kept, export_bytes
from nc_dist.plan.model_cost import ModelCost, ModelSize, element_size, model_cost, optimizer_bytes
from nc_dist.plan.time import ATTENTION_MFU, CONVOLUTION_MFU, Work, gpu_hours, intervals, steps_with, work
from nc_dist.plan.traffic import sent_in_a_step
from nc_dist.source_set import SourceSet, logit_classes

SCALAR_BYTES = 110  # of one number in metrics.jsonl and TensorBoard's file together, measured on small runs
SCALARS_A_STEP, SCALARS_A_MEASURE = 14, 160  # twice the latter with averaged weights
FIGURE_BYTES = 40_000  # of the class means, at each checkpoint


def cluster_plan(run: PretrainRun, data: SourceSet, cluster: Cluster, world: int, tested: int = 0) -> dict[str, str]:
    """Lines of the plan, {what: how much}, of a run that is tested on so many samples.

    Raises InputError for a GPU that is not known.
    """
    classes = logit_classes(run, data.source.class_names)
    images = run.batch.micro * run.loss.views
    cost = model_cost(run.model, classes, run.input, images, run.engine.precision)
    device = gpu(cluster.gpu) if cluster.gpu else _own_gpu()
    return {
        **_model_lines(cost),
        **memory_lines(run, cost, device, cluster, world),
        **({} if cost.untraced else _work_lines(run, work_of(run, data, cost, world, tested), cost, device, world)),
        **disk_lines(run, data, cost),
    }


def _own_gpu() -> Gpu | None:
    return recognised(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _model_lines(cost: ModelCost) -> dict[str, str]:
    parameters = f"{cost.parameters:,} parameters"
    if cost.untraced:
        unknown = f"unknown, the net cannot be traced ({cost.untraced})"
        return {"model": parameters, "FLOPs and activations": unknown}
    return {"model": f"{parameters}, {as_flops(cost.flops)} a forward of one image"}


def memory_lines(run: PretrainRun, cost: ModelCost, device: Gpu | None, cluster: Cluster, world: int) -> dict[str, str]:
    """A row of memory and traffic for each stage; which one is the run's own, and whether it fits."""
    accumulated = run.batch.global_ // run.batch.micro // world
    heads = ("weights", "gradients", "optimiser", "buckets", "activations", "at most", "in RAM", "sent")
    lines = {"bytes a process": "".join(f"{head:>12}" for head in heads)}
    for engine in every_stage(run.engine):
        batch = (run.batch.global_, run.batch.micro)
        memory = memory_of(engine, cost, run.optim, batch, world, gpu=device is not None, ema=bool(run.ema))
        held, stage = memory.held, stage_of(engine)
        sent = sent_in_a_step(stage, cost.trained, world, accumulated, memory.zero, element_size(engine.precision))
        of_forward = ("unknown",) * 2 if cost.untraced else (as_bytes(memory.activations), as_bytes(memory.peak))
        before = (held.parameters + held.average, held.gradients, held.optimizer, held.buckets)
        cells = (*map(as_bytes, before), *of_forward, as_bytes(held.on_cpu), as_bytes(sent))
        own = stage == stage_of(run.engine)
        name = "torch, DDP" if stage == DDP_BUCKETS else f"ZeRO {stage}"
        lines[f"  {name}{' <- this run' if own else ''}"] = "".join(f"{cell:>12}" for cell in cells)
        if own:
            most, own_sent = memory.peak, sent
    lines["of the table"] = (
        "weights with averages; `at most` in backward or update, without CUDA's context and workspaces; `in RAM` with "
        "offload; `sent` in a step"
    )
    if device is not None:
        fits = "the run fits" if most < 0.9 * device.memory_gb * 1e9 else "the run does not fit, or barely"
        said = "whether the run fits is unknown" if cost.untraced else fits
        lines["memory of the GPU"] = f"{device.memory_gb:g} GB ({device.name}): {said}"
    if cluster.nodes > 1 and own_sent:
        # A ring through all processes, node after node, crosses each node's edge once: NCCL may use more rings, each
        # with its part of the data.
        lines["bytes that leave a node in a step"] = f"{as_bytes(own_sent)}, once around a ring"
    return lines


def measured_at(run: PretrainRun, data: SourceSet) -> tuple[set[int], set[int]]:
    """Steps after which NC is measured, and those after which a checkpoint is saved."""
    measure, save = intervals(run.measure_every, run.save_every, data.steps, data.order.steps_per_epoch)
    chosen = {step for step in retention_of(run, data).chosen if step <= data.steps}
    saves = steps_with(save, data.steps) | chosen
    return {*range(measure, data.steps + 1, measure), *saves}, saves


def work_of(run: PretrainRun, data: SourceSet, cost: ModelCost, world: int, tested: int = 0) -> Work:
    """FLOPs of the run: training, what is done twice, the probes, the source accuracy on `tested` samples."""
    measures = 1 + len(measured_at(run, data)[0])
    kept = np.concatenate([data.train, data.heldout])
    final = tested + _probe_size(data, kept, run.probe.source_per_class) if tested else 0
    return work(
        forward=cost.flops,
        steps=data.steps,
        batch=run.batch.global_,
        views=run.loss.views,
        recompute=run.engine.recompute,
        cached=any_coupled((run.loss, *run.regularisers)) and run.batch.global_ > run.batch.micro * world,
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
        peak = device.peak(run.engine.precision, cost.attention)
        assumed = ATTENTION_MFU if cost.attention else CONVOLUTION_MFU
        hours = gpu_hours(done.total, peak, assumed)
        lines["GPU-hours"] = (
            f"{hours:.3g}, or {hours / world:.3g} hours on {world}, if {100 * assumed:.0f} % of {as_flops(peak)}/s "
            f"({device.name}, {run.engine.precision}) are reached: "
            "assumed, not measured; slow data and small images take longer"
        )
    else:
        lines["GPU-hours"] = "unknown without a GPU: --gpu names one"
    return lines


def checkpoint_size(run: PretrainRun, size: ModelSize) -> int:
    """Bytes of one checkpoint of the run."""
    element = element_size(run.engine.precision)
    moments = optimizer_bytes(run.optim, element)
    return checkpoint_bytes(
        size.parameters, sum(size.trained), moments, size.buffers, ema=bool(run.ema), element=element
    )


def disk_lines(run: PretrainRun, data: SourceSet, size: ModelSize) -> dict[str, str]:
    """Disk of the run's folder at most: checkpoints that are kept, the export, curves."""
    measures, saves = measured_at(run, data)
    one = checkpoint_size(run, size)
    kept = checkpoints_kept(sorted(saves), run.keep, sorted(retention_of(run, data).chosen))
    curves = (len(measures) * SCALARS_A_MEASURE + data.steps // run.log_every * SCALARS_A_STEP) * SCALAR_BYTES
    curves += len(saves) * FIGURE_BYTES
    export = export_bytes(size.parameters, size.buffers, element_size(run.engine.precision)) * (2 if run.ema else 1)
    return {
        "disk": f"{as_bytes(kept * one + export + curves)}: {kept} checkpoints of {as_bytes(one)} at most at a time, "
        f"export {as_bytes(export)}, curves {as_bytes(curves)}"
    }
