"""Engines own weights, optimiser and their distribution over ranks; the loop owns everything else.

The protocol and the specs are here; `make` builds an engine, and imports DeepSpeed only where it is asked for.
"""

from nc_dist.engine.protocol import Engine, evaluating
from nc_dist.engine.spec import DTYPES, HALF, CommonSpec, DeepSpeedSpec, EngineSpec, TorchSpec, deepspeed_json

__all__ = [
    "DTYPES",
    "HALF",
    "CommonSpec",
    "DeepSpeedSpec",
    "Engine",
    "EngineSpec",
    "TorchSpec",
    "deepspeed_json",
    "evaluating",
]
