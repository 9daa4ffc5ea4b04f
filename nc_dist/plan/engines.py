"""What an engine holds of a model, on paper, and all engines that a run could have instead. For plans."""

from __future__ import annotations

from typing import NamedTuple

from nc_dist.engine import DeepSpeedSpec, TorchSpec, deepspeed_json
from nc_dist.optim import OptimSpec
from nc_dist.plan.memory import DDP_BUCKETS, Stage, States, ZeroSettings, states, zero_settings
from nc_dist.plan.model_cost import ModelCost, element_size, optimizer_bytes


class Memory(NamedTuple):
    """Of one process, in bytes."""

    held: States
    activations: int  # 0 where the net cannot be traced
    peak: int
    zero: ZeroSettings


def memory_of(
    engine: TorchSpec | DeepSpeedSpec, cost: ModelCost, optim: OptimSpec, batch: tuple[int, int], world: int, *,
    gpu: bool, ema: bool = False,
) -> Memory:  # fmt: skip
    """What an engine holds of a model; `batch` is global and micro, of which the latter's activations are in `cost`."""
    element, zero = element_size(engine.precision), ZeroSettings()
    if isinstance(engine, DeepSpeedSpec):
        zero = zero_settings(deepspeed_json(engine, *batch, world, sum(cost.trained), gpu)["zero_optimization"])
    held = states(
        stage_of(engine), cost.trained, optimizer_bytes(optim, element), world, zero,
        rest=element * cost.frozen + cost.buffers, ema=ema, element=element,
    )  # fmt: skip
    activations = cost.recomputed if engine.recompute else cost.activations
    return Memory(held, activations, held.peak(activations), zero)


def stage_of(engine: TorchSpec | DeepSpeedSpec) -> Stage:
    """How an engine shares its states out."""
    return engine.zero if isinstance(engine, DeepSpeedSpec) else DDP_BUCKETS


def every_stage(engine: TorchSpec | DeepSpeedSpec) -> list[TorchSpec | DeepSpeedSpec]:
    """All ways to share the states out, with the run's own settings where they apply."""
    same = {"precision": engine.precision, "recompute": engine.recompute}
    ours = engine if isinstance(engine, DeepSpeedSpec) else DeepSpeedSpec()
    found: list[TorchSpec | DeepSpeedSpec] = [TorchSpec().model_copy(update=same)]
    for stage in (0, 1, 2, 3):
        offload = {
            "offload_optimizer": ours.offload_optimizer and stage > 0,
            "offload_parameters": ours.offload_parameters and stage == 3,
        }
        found.append(ours.model_copy(update={"zero": stage} | same | offload))
    return found
