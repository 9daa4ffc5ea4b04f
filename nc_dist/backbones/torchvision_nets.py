"""torchvision's nets by name: ResNet, ResNeXt, Wide ResNet, MobileNetV2 and V3, ConvNeXt, ViT."""

from __future__ import annotations

from typing import Any, Literal, Self

import torchvision
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torchvision.models import ResNet, VisionTransformer

from nc_dist.backbones import resnet, stages, vit
from nc_dist.backbones.cut import Backbone
from nc_dist.backbones.origin import Origin

# Families by how their names begin, and which of the options below torchvision has for each.
FAMILIES: dict[str, tuple[str, ...]] = {
    "resnet": (),
    "resnext": (),
    "wide_resnet": (),
    "mobilenet": ("dropout",),
    "convnext": ("drop_path",),
    "vit": ("dropout", "image_size"),
}
ARGUMENTS = {"drop_path": "stochastic_depth_prob"}  # what torchvision calls it, where it has a name of its own


class TorchvisionSpec(Origin):
    """One of torchvision's nets. `drop_path` and `dropout` null leave torchvision's own value.

    `stem: small` is for small images. ResNets: a 3x3 convolution of stride 1, no pooling. MobileNet: stride 1.
    ConvNeXt: patches of 2 pixels. ViT: patches of 4 pixels.
    """

    kind: Literal["torchvision"] = "torchvision"
    name: str
    stem: Literal["imagenet", "small"] = "imagenet"
    image_size: int = Field(224, ge=1)  # vision transformers have one position embedding for each patch
    drop_path: float | None = Field(None, ge=0, lt=1)  # of the last block; ConvNeXt
    dropout: float | None = Field(None, ge=0, lt=1)  # ViT, MobileNet

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = [n for n in torchvision.models.list_models(torchvision.models) if _family(n)]
        if name not in known:
            raise ValueError(f"unknown torchvision model; allowed are {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _has_options(self) -> Self:
        for option in ("drop_path", "dropout"):
            if getattr(self, option) is not None and option not in FAMILIES[_family(self.name)]:
                have = [f"{family}.." for family, options in FAMILIES.items() if option in options]
                raise ValueError(f"{option}={getattr(self, option)}: {self.name} has none, only {', '.join(have)} have")
        if self._has_small_patches() and self.image_size % vit.SMALL_PATCH:
            raise ValueError(f"image_size={self.image_size}: must be a multiple of {vit.SMALL_PATCH}, the patch")
        return self

    def _has_small_patches(self) -> bool:
        return self.stem == "small" and _family(self.name) == "vit"

    def build(self) -> Backbone:
        options = {option: getattr(self, option) for option in FAMILIES[_family(self.name)]}
        if self._has_small_patches():  # as many position embeddings as there will be patches
            options["image_size"] = self.image_size // vit.SMALL_PATCH * int(self.name.rpartition("_")[2])
        given = {ARGUMENTS.get(option, option): value for option, value in options.items() if value is not None}
        net = torchvision.models.get_model(self.name, weights=None, **given)
        if isinstance(net, VisionTransformer) and self.stem == "small":
            vit.small_patches(net, self.image_size)
        elif self.stem == "small":
            (resnet if isinstance(net, ResNet) else stages).small_stem(net)
        return cut(net)

    def tags(self) -> list[str]:
        return [weights.name for weights in torchvision.models.get_model_weights(self.name)]

    def published(self, tag: str) -> dict[str, Tensor]:
        weights = torchvision.models.get_model_weights(self.name)[tag]
        return weights.get_state_dict(progress=False, check_hash=True)  # type: ignore[no-any-return]


def cut(net: Any) -> Backbone:
    """A net of one of the families; its classifier is taken off."""
    if isinstance(net, VisionTransformer):
        net.heads = nn.Identity()
        return vit.from_vit(net)
    if isinstance(net, ResNet):
        net.fc = nn.Identity()
        return resnet.from_resnet(net)
    dim = net.classifier[-1].in_features
    net.classifier[-1] = nn.Identity()
    return stages.from_stages(net, dim)


def _family(name: str) -> str:
    """The family, or nothing for a net that is of none."""
    return next((family for family in FAMILIES if name.startswith(family)), "")
