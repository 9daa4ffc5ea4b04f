"""Memory of a process on paper, by ZeRO stage, and what checkpoints take on disk. Pure arithmetic, no torch.

P parameters, W processes. Weights, gradients and optimiser state are fp32 whatever the precision of the forward
(autocast), so that the 2 + 2 + 12 bytes a parameter of the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section
3.1: half-precision weights and gradients, fp32 masters and Adam) are here 4 + 4 + 8, and 4 more for the masters that
DeepSpeed keeps all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

DDP_BUCKETS = "ddp"  # a stage of its own: torch's DistributedDataParallel
Stage = str | int  # "ddp" or 0, 1, 2, 3


@dataclass(frozen=True)
class ZeroSettings:
    """What of DeepSpeed's configuration memory and traffic depend on; numbers of elements, not bytes."""

    reduce_bucket: int = 500_000_000
    overlap: bool = False
    persistence: int = 100_000  # ZeRO 3: parameters up to this size stay on every process
    live: int = 1_000_000_000  # ZeRO 3: nothing is fetched ahead while so many are gathered
    reuse: int = 1_000_000_000  # ZeRO 3: parameters that are used again within so many elements stay gathered
    prefetch: int = 50_000_000  # ZeRO 3: fetched ahead at a time
    offload_optimizer: bool = False
    offload_parameters: bool = False


def zero_settings(zero: Mapping[str, Any]) -> ZeroSettings:
    """From DeepSpeed's `zero_optimization`; where a key is absent, its default in DeepSpeed 0.19."""
    default = ZeroSettings()
    stage = zero["stage"]
    return ZeroSettings(
        int(zero.get("reduce_bucket_size", default.reduce_bucket)),
        bool(zero.get("overlap_comm", stage == 3)),
        int(zero.get("stage3_param_persistence_threshold", default.persistence)),
        int(zero.get("stage3_max_live_parameters", default.live)),
        int(zero.get("stage3_max_reuse_distance", default.reuse)),
        int(zero.get("stage3_prefetch_bucket_size", default.prefetch)),
        _to_cpu(zero.get("offload_optimizer")),
        _to_cpu(zero.get("offload_param")),
    )


def _to_cpu(offload: Mapping[str, Any] | None) -> bool:
    return offload is not None and offload.get("device") not in (None, "none")


@dataclass(frozen=True)
class States:
    """Bytes of one process, besides activations."""

    parameters: int
    gradients: int  # kept from backward to update
    optimizer: int  # its state, and DeepSpeed's fp32 masters
    buckets: int  # for communication, during the backward
    update: int  # copies that exist during the update only
    on_cpu: int  # of a process with offload, in main memory
    average: int = 0  # moving averages of weights

    def peak(self, activations: int) -> int:
        """Bytes on the device at most: either in the backward or in the update."""
        held = self.parameters + self.optimizer + self.average + self.gradients
        return held + max(self.buckets + activations, self.update)


def partition(numels: Sequence[int], world: int) -> int:
    """Elements that a process owns in ZeRO 3, where each parameter is divided and padded on its own."""
    return sum(-(-n // world) for n in numels)


def states(
    stage: Stage,
    numels: Sequence[int],
    moments: int,
    world: int,
    zero: ZeroSettings,
    *,
    rest: int = 0,
    ema: bool = False,
    element: int = 4,
) -> States:
    """States of one process: `numels` trained parameters, `moments` bytes of optimiser state for each of their
    elements; `rest` are the bytes of buffers and parameters that are not trained.

    Stage 0 and DDP hold everything; ZeRO 1 divides the optimiser (P_os), 2 the gradients too (P_os+g), 3 the
    parameters too (P_os+g+p): arXiv 1910.02054, figure 1. DDP's buckets are the gradients themselves (torch's
    `gradient_as_bucket_view`), DeepSpeed's as `reduce_bucket_size` says, twice with overlap. The
    foreach updates of torch's optimisers take about as much again as the parameters that they update.
    """
    total = sum(numels)
    whole = element * total
    if stage not in (1, 2, 3):
        buckets = element * min(total, zero.reduce_bucket) if world > 1 and stage != DDP_BUCKETS else 0
        average = whole + rest if ema else 0
        return States(whole + rest, whole, moments * total, buckets, whole, 0, average)
    own = partition(numels, world) if stage == 3 else -(-total // world)
    share = element * own
    held = States(
        parameters=whole + rest,
        gradients=whole if stage == 1 else share,
        optimizer=share + moments * own,  # fp32 masters too
        buckets=element * zero.reduce_bucket * (2 if zero.overlap else 1),
        update=2 * share,  # the gradients as one flat tensor, and what the update makes
        on_cpu=0,
        average=share + rest if ema else 0,
    )
    if stage == 3:
        held = replace(held, parameters=element * sum(held_in_zero3(numels, zero)) + share + rest)
    return _offloaded(held, stage, share, zero)


def _offloaded(held: States, stage: Stage, share: int, zero: ZeroSettings) -> States:
    """Masters, moments, averages and the gradients that they are updated with in main memory, where the update runs;
    in stage 3 the process's part of the parameters too."""
    if zero.offload_optimizer:
        gradients = held.gradients if stage == 1 else 0
        moved = held.optimizer + held.average + held.update
        held = replace(held, gradients=gradients, optimizer=0, average=0, update=0, on_cpu=moved)
    if zero.offload_parameters and stage == 3:
        held = replace(held, parameters=held.parameters - share, on_cpu=held.on_cpu + share)
    return held


def held_in_zero3(numels: Sequence[int], zero: ZeroSettings) -> tuple[int, int]:
    """Elements that every process of ZeRO 3 holds: small parameters all the time, others at most while they are used.

    A gathered parameter is let go unless it is used again within `reuse` elements, half of which lie in the forward
    and half in the backward. More are fetched ahead, until `live` are there; the largest parameter is in any case.
    """
    large = [n for n in numels if n > zero.persistence]
    ahead = max(zero.reuse // 2, min(zero.live, zero.prefetch))
    return sum(numels) - sum(large), min(sum(large), max(large, default=0) + ahead)


def checkpoint_bytes(
    parameters: int, trained: int, moments: int, buffers: int, *, ema: bool = False, element: int = 4
) -> int:
    """One checkpoint, all files of all processes: weights (masters), optimiser state, averages, the export besides.

    It is the same in all stages: nothing is stored twice.
    """
    times = 2 if ema else 1
    export = export_bytes(parameters, buffers, element)
    return times * (element * parameters + buffers + export) + moments * trained


def export_bytes(parameters: int, buffers: int, element: int = 4) -> int:
    """backbone.safetensors and model.safetensors."""
    return 2 * (element * parameters + buffers)


def checkpoints_kept(saves: Sequence[int], keep: int | None, kept_steps: Sequence[int]) -> int:
    """How many checkpoints lie on the disk at most: the newest, the best, chosen ones, and one being written."""
    if keep is None:
        return len(saves)
    return min(len(saves), keep + 1 + len(set(kept_steps) & set(saves)) + 1)
