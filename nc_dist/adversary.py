"""Adversarial training (Madry et al. 2018, arXiv 1706.06083): images are moved, within a ball, to where the loss is
larger. Robust sources collapse less, so that epsilon is a knob of the study. Called by the loop, for one micro-batch.

Letters: B images, d = 3 * S * S numbers of each.
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
Norm = Literal["l2", "linf"]


class NoAdversary(Spec):
    """Images as they are."""

    kind: Literal["none"] = "none"

    def attacked(self, images: Tensor, input: InputSpec, loss_of: LossOf, random: torch.Generator) -> Tensor:
        return images


class PGD(Spec):
    """Projected gradient ascent; norm, epsilon and step size are of an image's pixel values, which are in 0..1.

    Three steps of 2/3 epsilon, the default, are common for L2-robust ImageNet models.
    """

    kind: Literal["pgd"] = "pgd"
    norm: Norm = "l2"
    epsilon: float = Field(0.5, gt=0)  # radius of the ball
    steps: int = Field(3, ge=1)
    step_size: float | None = Field(None, gt=0)  # null: 2 epsilon / steps, which crosses the ball once
    random_start: bool = True

    def attacked(self, images: Tensor, input: InputSpec, loss_of: LossOf, random: torch.Generator) -> Tensor:
        """Normalised images (B, 3, S, S), moved so that `loss_of` them is larger; `random` decides the start."""
        mean, std = (images.new_tensor(channel)[:, None, None] for channel in (input.mean, input.std))
        pixels = images * std + mean
        size = self.step_size or 2 * self.epsilon / self.steps
        moved = pixels
        if self.random_start:
            moved = (pixels + in_ball(pixels, self.norm, self.epsilon, random)).clamp(0, 1)
        for _ in range(self.steps):
            seen = ((moved - mean) / std).requires_grad_()
            # Of the sum over images: that of the mean would vanish in half precision, and its direction is the same.
            (gradient,) = torch.autograd.grad(loss_of(seen) * len(seen), seen)
            moved = moved + size * steepest(gradient.nan_to_num(0, 0, 0) / std, self.norm)  # fp16 may overflow
            moved = (pixels + projected(moved - pixels, self.norm, self.epsilon)).clamp(0, 1)
        return (moved - mean) / std


AdversarySpec = Annotated[NoAdversary | PGD, Field(discriminator="kind")]


def in_ball(like: Tensor, norm: Norm, epsilon: float, random: torch.Generator) -> Tensor:
    """Uniform draws from balls of radius epsilon, one for each image of `like` (B, 3, S, S)."""
    if norm == "linf":
        return epsilon * (2 * torch.rand(like.shape, generator=random, device=like.device, dtype=like.dtype) - 1)
    direction = steepest(torch.randn(like.shape, generator=random, device=like.device, dtype=like.dtype), norm)
    share = torch.rand(len(like), 1, 1, 1, generator=random, device=like.device, dtype=like.dtype)
    return epsilon * share ** (1 / like[0].numel()) * direction


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The move of length 1 along which the loss grows fastest, for each image; none where the gradient is 0."""
    if norm == "linf":
        return gradient.sign()
    return gradient / lengths(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)


def projected(delta: Tensor, norm: Norm, epsilon: float) -> Tensor:
    """The nearest point of the ball, for each image."""
    if norm == "linf":
        return delta.clamp(-epsilon, epsilon)
    return delta * (epsilon / lengths(delta).clamp_min(epsilon))


def lengths(images: Tensor) -> Tensor:
    """L2 norms (B, 1, 1, 1)."""
    norms_B111: Tensor = torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)
    return norms_B111
