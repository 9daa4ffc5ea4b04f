"""The two engines as specs, and the pure function that writes DeepSpeed's configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

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
    deterministic: bool = False  # cuDNN's kernels give the same bits each time; false: the fastest ones are looked for
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
