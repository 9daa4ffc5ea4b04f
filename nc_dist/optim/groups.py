"""What optimisers have in common, and how a model's parameters are put into groups for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from nc_dist.spec import Spec

Group = dict[str, Any]  # params, weight_decay, lr_scale: what torch's optimisers take, and our own factor


class Optim(Spec):
    """`lr` is absolute: nobody rescales it by the batch or the world."""

    lr: float
    weight_decay: float = Field(ge=0)
    # Weight decay of everything, as the theory of collapse has it. False: of matrices and kernels alone, not of norms,
    # biases, tokens, position embeddings and layer scales, as recipes for transformers have it.
    decay_norm_and_bias: bool = True
    layer_decay: float = Field(1.0, gt=0, le=1)  # each block learns by this factor slower than the next one

    def build(self, groups: list[Group], fused: bool = False) -> torch.optim.Optimizer:
        """The optimiser of these groups; `fused` where one kernel, or one loop of the CPU, can do an update."""
        raise NotImplementedError


def parameter_groups(model: nn.Module, blocks: Sequence[str], optim: Optim) -> list[Group]:
    """The trained parameters in groups of one weight decay and one `lr_scale` each, by which the engine multiplies lr.

    `blocks` are the prefixes of the model's parameter names, from the input on; see `depths`.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    named = list(model.named_parameters())
    for (name, parameter), depth in zip(named, depths([name for name, _ in named], blocks), strict=True):
        if parameter.requires_grad:
            decayed = optim.decay_norm_and_bias or (parameter.ndim > 1 and name.endswith("weight"))
            scale = optim.layer_decay ** (len(blocks) + 1 - depth)
            found.setdefault((optim.weight_decay if decayed else 0.0, scale), []).append(parameter)
    return [{"params": params, "weight_decay": decay, "lr_scale": scale} for (decay, scale), params in found.items()]


def depths(names: Sequence[str], blocks: Sequence[str]) -> list[int]:
    """How deep each parameter lies: 0 before the first block, i in the i-th one, len(blocks) + 1 after the last.

    What lies between two blocks goes with the one before it. `names` come in the model's order.
    """
    prefixes = [f"{block}." for block in blocks]
    numbers = [next((i for i, start in enumerate(prefixes, 1) if name.startswith(start)), 0) for name in names]
    last = max((place for place, number in enumerate(numbers) if number), default=-1)
    found, depth = [], 0
    for place, number in enumerate(numbers):
        depth = number or (depth if place < last else len(blocks) + 1)
        found.append(depth)
    return found
