"""What of an engine's settings cannot work together, or not on this machine. For the journeys and their checks."""

from __future__ import annotations

from typing import Literal

from nc_dist.engine import DeepSpeedSpec, TorchSpec
from nc_dist.errors import InputError
from nc_dist.optim import LARS, OptimSpec

NO_GPU = "there is none here (where only Ray's workers have one, say launch.gpus=1)"


def check_engine(
    engine: TorchSpec | DeepSpeedSpec, cuda: bool, batch_norm: Literal["micro", "sync"] = "micro", micros: int = 1
) -> None:
    """InputError for settings that exclude each other, or that need a GPU where there is none.

    `micros`: micro-batches of a step that each process takes one after another.
    """
    if engine.precision == "fp16" and not cuda:
        raise InputError(f"engine.precision='fp16': needs a GPU, and {NO_GPU}; on a CPU use bf16 or fp32")
    if batch_norm == "sync" and not cuda:
        raise InputError(f"batch_norm='sync': needs GPUs, and {NO_GPU}; on a CPU use batch_norm=micro")
    if batch_norm == "sync" and micros > 1:
        raise InputError(
            f"batch_norm='sync': each process takes {micros} micro-batches a step, one after another, so that their "
            "statistics would not be those of the global batch; use a larger batch.micro, or more processes"
        )
    if isinstance(engine, TorchSpec):
        return
    if engine.compile and engine.zero == 3:
        raise InputError("engine.compile=true: not with engine.zero=3, whose weights come and go; use zero 0, 1 or 2")
    if engine.offload_optimizer and engine.zero == 0:
        raise InputError("engine.offload_optimizer=true: not with engine.zero=0; use zero 1, 2 or 3")
    if engine.offload_parameters and engine.zero != 3:
        raise InputError(f"engine.offload_parameters=true: not with engine.zero={engine.zero}; use zero 3")


def check_optim(optim: OptimSpec, engine: TorchSpec | DeepSpeedSpec) -> None:
    """InputError for an optimiser that needs whole parameters where the engine flattens and splits them."""
    if isinstance(optim, LARS) and isinstance(engine, DeepSpeedSpec) and engine.zero > 0:
        raise InputError(
            f"optim.kind='lars': not with engine.zero={engine.zero}, which has no whole parameters for its norms; use "
            "engine.zero=0, engine.kind=torch, or optim.kind=sgd"
        )
