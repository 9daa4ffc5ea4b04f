"""The engine owns weights, optimiser and their distribution over ranks; the loop owns everything else.

Here are the protocol, the specs and the pure function that writes DeepSpeed's configuration; the two engines have files
of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from nc_dist.model import Model, Outputs
from nc_dist.spec import Spec

Precision = Literal["fp32", "bf16", "fp64"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


class TorchSpec(Spec):
    """Plain torch; DDP when there are several ranks. `clip` is the largest gradient norm, 0 for none."""

    kind: Literal["torch"] = "torch"
    precision: Precision = "fp32"
    clip: float = Field(0.0, ge=0)


class DeepSpeedSpec(Spec):
    """DeepSpeed with ZeRO stage 0-3: what is shared out is nothing, optimiser, + gradients, + parameters."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32"] = "fp32"
    clip: float = Field(0.0, ge=0)


EngineSpec = Annotated[TorchSpec | DeepSpeedSpec, Field(discriminator="kind")]


class Engine(Protocol):
    """What the loop needs of plain torch or DeepSpeed. Calls that several ranks make are made by all of them."""

    module: Model
    input_dtype: torch.dtype
    ema: Model | None  # averaged weights, where the engine keeps them

    def forward(self, x: Tensor, last: bool = True) -> Outputs:
        """Training forward; `last` says that the step's gradients are reduced in this backward."""

    def eval_forward(self, x: Tensor) -> Outputs:
        """Forward in eval mode, without gradients."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, which is scaled already so that the step's losses add up."""

    def step(self, lr: float) -> bool:
        """Clip, update with this learning rate, clear the gradients; did the weights move?"""

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradients, before clipping."""

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Each rank writes its own files."""

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what `save` wrote; returns the client state."""

    def gathered(self) -> AbstractContextManager[Model]:
        """The model with all its weights in place, in any ZeRO stage."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards every submodule is in the mode it was in."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


def deepspeed_json(spec: DeepSpeedSpec, global_batch: int, micro: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Every key whose absence means something else than "off" is written."""
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": global_batch // (micro * world_size),
        "managed_gradient_accumulation": False,  # backward adds, step ends the accumulation: the loop's own words
        "gradient_clipping": spec.clip,  # absent means 1.0 in DeepSpeed 0.19
        "zero_optimization": {"stage": spec.zero},
        "zero_allow_untested_optimizer": True,  # torch's own optimisers
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
