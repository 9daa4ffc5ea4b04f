"""What happens to an image between decoding and the network: the input size, and augmentations as specs.

Everything works on (3, H, W) uint8; normalisation is done on the device, for a whole batch, by `normalise`.
Augmentations draw from the generator they are given and from nothing else: it is keyed by seed, epoch and position.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize, resized_crop

from nc_dist.spec import Spec

Triple = tuple[float, float, float]
Interpolation = Literal["bilinear", "bicubic"]


class InputSpec(Spec):
    """What the network sees: images of size x size, scaled to [0, 1], minus mean, divided by std (per channel)."""

    size: int = Field(32, ge=1)
    crop: float = Field(1.0, gt=0, le=1)  # evaluation: short side to size/crop, then the centre; 0.875 is ImageNet's
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.25, 0.25, 0.25)
    interpolation: Interpolation = "bilinear"  # of the evaluation's resize


class InputChange(Spec):
    """What is to be different from the input that a model was made for; null leaves it."""

    size: int | None = Field(None, ge=1)
    crop: float | None = Field(None, gt=0, le=1)
    mean: Triple | None = None
    std: Triple | None = None
    interpolation: Interpolation | None = None

    def of(self, input: InputSpec) -> InputSpec:
        """The input with the changes."""
        return input.model_copy(update={key: value for key, value in self if value is not None})


class NoAugment(Spec):
    """The evaluation transform in training as well."""

    kind: Literal["none"] = "none"

    def apply(self, image: Tensor, size: InputSpec, random: np.random.Generator) -> Tensor:
        return evaluation(image, size)


class CropFlip(Spec):
    """Small images: zero-pad, crop at random, mirror half of the time."""

    kind: Literal["crop_flip"] = "crop_flip"
    pad: int = Field(4, ge=0)
    flip: bool = True

    def apply(self, image: Tensor, size: InputSpec, random: np.random.Generator) -> Tensor:
        image = F.pad(evaluation(image, size), [self.pad] * 4)
        top, left = random.integers(0, 2 * self.pad + 1, size=2).tolist()
        image = image[:, top : top + size.size, left : left + size.size]
        return image.flip(-1) if self.flip and random.random() < 0.5 else image


class ResizedCropFlip(Spec):
    """Photographs: a crop of random area and aspect, resized, mirrored half of the time (Szegedy et al. 2015)."""

    kind: Literal["resized_crop_flip"] = "resized_crop_flip"
    min_area: float = Field(0.08, gt=0, le=1)
    flip: bool = True

    def apply(self, image: Tensor, size: InputSpec, random: np.random.Generator) -> Tensor:
        top, left, height, width = self._box(image.shape[1], image.shape[2], random)
        image = resized_crop(image, top, left, height, width, [size.size, size.size], antialias=True)
        return image.flip(-1) if self.flip and random.random() < 0.5 else image

    def _box(self, height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = random.uniform(self.min_area, 1.0) * height * width
            aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                return int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1)), h, w
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side


AugmentSpec = Annotated[NoAugment | CropFlip | ResizedCropFlip, Field(discriminator="kind")]


def evaluation(image: Tensor, size: InputSpec) -> Tensor:
    """Short side to size/crop, then the centre size x size; an image that has the size already is left alone."""
    if image.shape[1:] == (size.size, size.size):
        return image
    short = round(size.size / size.crop)
    mode = InterpolationMode(size.interpolation)
    resized: Tensor = center_crop(resize(image, [short], mode, antialias=True), [size.size, size.size])
    return resized


def normalise(images: Tensor, size: InputSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, 3, S, S) uint8 to normalised floats of `dtype`, on the images' device.

    Channels come last in memory and convolutions keep it so: 1.3 times as fast on a CPU, and what tensor cores want.
    """
    mean = torch.tensor(size.mean, dtype=dtype, device=images.device)[:, None, None]
    std = torch.tensor(size.std, dtype=dtype, device=images.device)[:, None, None]
    return ((images.to(dtype) / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def keyed_random(seed: int, epoch: int, position: int, view: int) -> np.random.Generator:
    """The random numbers of one view of one sample in one epoch, whichever process draws them."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, view, position]))
