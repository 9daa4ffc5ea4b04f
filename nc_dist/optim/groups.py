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
    decay_norm_and_bias: bool = True  # weight decay of norms and biases too, as the theory of collapse has it
    layer_decay: float = Field(1.0, gt=0, le=1)  # each block learns by this factor slower than the next one

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """The optimiser of these groups."""
        raise NotImplementedError


def parameter_groups(model: nn.Module, blocks: Sequence[str], optim: Optim) -> list[Group]:
    """The trained parameters in groups of one weight decay and one `lr_scale` each, by which the engine multiplies lr.

    `blocks` are the prefixes of the model's parameter names, from the input on. What comes before the first block has
    depth 0, what comes after the last one the greatest, len(blocks) + 1, and there lr_scale is 1.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    prefixes, depth = [f"{block}." for block in blocks], 0
    for name, parameter in model.named_parameters():
        within = [i + 1 for i, prefix in enumerate(prefixes) if name.startswith(prefix)]
        depth = within[0] if within else len(blocks) + 1 if depth else 0
        if parameter.requires_grad:
            decayed = optim.decay_norm_and_bias or parameter.ndim > 1
            scale = optim.layer_decay ** (len(blocks) + 1 - depth)
            found.setdefault((optim.weight_decay if decayed else 0.0, scale), []).append(parameter)
    return [{"params": params, "weight_decay": decay, "lr_scale": scale} for (decay, scale), params in found.items()]
