"""Mixing images of one micro-batch on the device: mixup and cutmix as specs.

One share and one box for a whole micro-batch, as in the papers' code. The caller's generator decides everything, so
that a mixture does not depend on the process that makes it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nc_dist.errors import InputError
from nc_dist.spec import Spec


class Mixture(NamedTuple):
    """A micro-batch in which image i is `share` of itself and 1 - share of image partner_B[i]; None: nothing mixed."""

    images: Tensor  # (B, 3, S, S), normalised
    partner_B: Tensor | None = None
    share: float = 1.0

    def targets(self, labels_B: Tensor, like_BK: Tensor | None) -> Tensor:
        """The labels, or where images were mixed the classes' shares (B, K), of the type of the logits `like_BK`."""
        if self.partner_B is None or like_BK is None:
            return labels_B
        own_BK = F.one_hot(labels_B, like_BK.shape[1]).to(like_BK.dtype)
        return self.share * own_BK + (1 - self.share) * own_BK[self.partner_B]


class NoMix(Spec):
    """Every image is its own."""

    kind: Literal["none"] = "none"

    def mixed(self, images: Tensor, random: np.random.Generator) -> Mixture:
        return Mixture(images)


class Mixup(Spec):
    """Convex combinations of two images, share ~ Beta(alpha, alpha) (Zhang et al. 2018, arXiv 1710.09412)."""

    kind: Literal["mixup"] = "mixup"
    alpha: float = Field(0.2, gt=0)

    def mixed(self, images: Tensor, random: np.random.Generator) -> Mixture:
        share, partner_B = _drawn(self.alpha, images, random)
        return Mixture(images * share + images[partner_B] * (1 - share), partner_B, share)


class Cutmix(Spec):
    """A box of the partner is pasted over an image; its area is 1 - share (Yun et al. 2019, arXiv 1905.04899)."""

    kind: Literal["cutmix"] = "cutmix"
    alpha: float = Field(1.0, gt=0)

    def mixed(self, images: Tensor, random: np.random.Generator) -> Mixture:
        share, partner_B = _drawn(self.alpha, images, random)
        top, bottom, left, right = box(images.shape[2], images.shape[3], share, random)
        pasted = images.clone()
        pasted[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right][partner_B]
        outside = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
        return Mixture(pasted, partner_B, outside)


MixSpec = Annotated[NoMix | Mixup | Cutmix, Field(discriminator="kind")]


class Mixable(Protocol):
    """What is asked of a loss: its name, how many views of an image it wants, whether targets may be probabilities."""

    soft: ClassVar[bool]

    @property
    def named(self) -> str: ...

    @property
    def views(self) -> int: ...


def check_mix(mix: NoMix | Mixup | Cutmix, loss: Mixable) -> None:
    """InputError where the loss has no meaning for mixed images: it compares samples, or wants two views of each."""
    if mix.kind != "none" and not (loss.soft and loss.views == 1):
        raise InputError(
            f"data.mix.kind={mix.kind!r}: {loss.named} needs images of one class each; "
            "use data.mix.kind=none, or a term of one view that takes probabilities as targets, such as loss.kind=ce"
        )


def _drawn(alpha: float, images: Tensor, random: np.random.Generator) -> tuple[float, Tensor]:
    """The share that an image keeps, and everyone's partner (B,): a permutation, so each image is used twice."""
    share = float(random.beta(alpha, alpha))
    return share, torch.from_numpy(random.permutation(len(images))).to(images.device)


def box(height: int, width: int, share: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box of 1 - share of the area about a uniform centre, cut off at the edges."""
    half = (1 - share) ** 0.5 / 2
    y, x = random.integers(0, height), random.integers(0, width)
    rows, columns = round(half * height), round(half * width)
    return max(y - rows, 0), min(y + rows, height), max(x - columns, 0), min(x + columns, width)
