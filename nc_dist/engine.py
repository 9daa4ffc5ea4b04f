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

from nc_dist.model import Model
from nc_dist.outputs import Outputs
from nc_dist.spec import Spec

Precision = Literal["fp32", "bf16", "fp16", "fp64"]  # of the forward; weights stay fp32, in fp64 fp64
DTYPES: dict[str, torch.dtype] = {"fp64": torch.float64}  # of weights and input, where it is not fp32
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of activations, where it is not that of the weights


class CommonSpec(Spec):
    """What both engines know. `clip` is the largest gradient norm, 0 for none."""

    precision: Precision = "fp32"
    clip: float = Field(0.0, ge=0)
    channels_last: bool = True  # memory format of images and convolutions
    compile: bool = False  # torch.compile
    recompute: bool = False  # activations of blocks are not kept but computed again in the backward


class TorchSpec(CommonSpec):
    """Plain torch; DDP when there are several ranks."""

    kind: Literal["torch"] = "torch"


class DeepSpeedSpec(CommonSpec):
    """DeepSpeed with ZeRO stage 0-3: what is shared out is nothing, optimiser, + gradients, + parameters."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    offload_optimizer: bool = False  # optimiser state and its step on the CPU; ZeRO 1-3
    offload_parameters: bool = False  # parameters too; ZeRO 3


EngineSpec = Annotated[TorchSpec | DeepSpeedSpec, Field(discriminator="kind")]


class Engine(Protocol):
    """What the loop needs of plain torch or DeepSpeed. Calls that several ranks make are made by all of them."""

    module: Model
    input_dtype: torch.dtype

    def forward(self, x: Tensor, last: bool = True) -> Outputs:
        """Training forward; `last` says that the step's gradients are reduced in this backward."""

    def eval_forward(self, x: Tensor, gradients: bool = False) -> Outputs:
        """Forward in eval mode; with `gradients`, one can ask for those of the input."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, which is scaled already so that the step's losses add up."""

    def step(self, lr: float) -> bool:
        """Clip, update with this learning rate, clear the gradients; did the weights move?

        They do not, and nothing else of the optimiser does, where the gradients are not finite on any rank.
        """

    def average(self) -> None:
        """Move the averages, where they are kept, towards the weights and running statistics."""

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradients, before clipping."""

    def save(self, folder: Path, client_state: dict[str, Any]) -> list[Path]:
        """Each rank writes its own files; which these are. One that cannot write still takes part to the end."""

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what `save` wrote; returns the client state."""

    def gathered(self) -> AbstractContextManager[Model]:
        """The model with all its weights in place, in any ZeRO stage."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights and running statistics are the moving averages of an engine that keeps them."""


@contextmanager
def evaluating(module: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Eval mode inside, without gradients unless they are asked for; afterwards every submodule is as it was."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for m, training in modes:
            m.training = training


def deepspeed_json(
    spec: DeepSpeedSpec, global_batch: int, micro: int, world_size: int, parameters: int, gpu: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration for so many trained parameters. Every key whose absence means something else than
    "off" is written.
    """
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": global_batch // (micro * world_size),
        "managed_gradient_accumulation": False,  # backward adds, step ends the accumulation: the loop's own words
        "gradient_clipping": spec.clip,  # absent means 1.0 in DeepSpeed 0.19
        "zero_optimization": _zero_json(spec, parameters, gpu),
        "zero_allow_untested_optimizer": True,  # torch's own optimisers
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},  # weights stay fp32, the forward runs under our autocast
        "fp16": {"enabled": False},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def _zero_json(spec: DeepSpeedSpec, parameters: int, gpu: bool) -> dict[str, Any]:
    """Sizes are numbers of elements, by a rule of our own.

    Buckets are an eighth of the parameters, so that their reduction can overlap with the backward, between 2^20 (4 MB,
    below which the latency of a collective counts) and 2^26. DeepSpeed's 5e8 would take 2 GB for any model. In stage 3
    parameters below a thousandth of all, at most DeepSpeed's 1e5, stay gathered (norms and biases), and a quarter of
    all may be gathered at a time. On a CPU there is nothing to overlap with; stages 0 and 1 reduce when the step ends.
    """
    bucket = min(max(parameters // 8, 2**20), 2**26)
    found: dict[str, Any] = {
        "stage": spec.zero,
        "contiguous_gradients": True,
        "overlap_comm": gpu and spec.zero >= 2,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    offload = {"device": "cpu", "pin_memory": gpu}
    if spec.offload_optimizer:
        found["offload_optimizer"] = offload
    if spec.zero == 3:
        found |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": min(parameters // 1000, 100_000),
            "stage3_max_live_parameters": parameters // 4,
            "stage3_max_reuse_distance": parameters // 4,
        }
        if spec.offload_parameters:
            found["offload_param"] = offload
    return found
