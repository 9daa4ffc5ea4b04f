"""Adversarial training (Madry et al. 2018, arXiv 1706.06083): images are moved, within a ball, to where the loss is
larger. Robust sources collapse less, so that epsilon is a knob of the study. Called by the loop, for one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from nc_dist.data.augment import InputSpec
from nc_dist.spec import Spec

LossOf = Callable[[Tensor], Tensor]  # normalised images (B, 3, S, S) to the loss, differentiable in the images


class NoAdversary(Spec):
    """Images as they are."""

    kind: Literal["none"] = "none"

    def attacked(self, images: Tensor, input: InputSpec, loss_of: LossOf, random: torch.Generator) -> Tensor:
        return images


class PGD(Spec):
    """Projected gradient ascent from a random start; epsilon is the radius in pixel values of 0..1."""

    kind: Literal["pgd"] = "pgd"
    norm: Literal["l2", "linf"] = "l2"
    epsilon: float = Field(0.5, gt=0)
    steps: int = Field(3, ge=1)
    step_size: float | None = Field(None, gt=0)  # null: 2/3 of epsilon, as in Engstrom et al.'s `robustness`
    random_start: bool = True

    def attacked(self, images: Tensor, input: InputSpec, loss_of: LossOf, random: torch.Generator) -> Tensor:
        raise NotImplementedError


AdversarySpec = Annotated[NoAdversary | PGD, Field(discriminator="kind")]
