"""From an engine's spec to the engine. DeepSpeed is imported only when it is asked for: it takes seconds."""

from __future__ import annotations

import torch

from nc_dist.engine import DeepSpeedSpec, Engine, TorchSpec
from nc_dist.engine.torch_engine import TorchEngine
from nc_dist.model import Model
from nc_dist.optim import OptimSpec
from nc_dist.world import World


def make_engine(
    model: Model,
    spec: TorchSpec | DeepSpeedSpec,
    optim: OptimSpec,
    batch: tuple[int, int],
    world: World,
    ema: float | None = None,
) -> Engine:
    """The engine that `spec` names; `batch` is (global, micro), `ema` the decay of averaged weights, None for none."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = spec.deterministic, not spec.deterministic
    if isinstance(spec, TorchSpec):
        return TorchEngine(model, spec, optim, world, ema)
    from nc_dist.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, spec, optim, batch, world, ema)
