"""Backbones: a torchvision-style net cut at its blocks, and the constructors of the families known by name.

A backbone runs as  stem -> blocks, in order -> finish, and never changes the names of the net's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
import torchvision
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from nc_dist.spec import Spec


@dataclass(frozen=True)
class Block:
    """A place where the net can be cut, measured or tuned."""

    name: str  # of the submodule, as in the state dict
    dim: int  # of its pooled features
    pooling: Literal["average", "cls"]


class Backbone(nn.Module):
    """`net` without its classifier, as a sequence of blocks; `dim` is the size of its features."""

    def __init__(
        self,
        net: nn.Module,
        blocks: list[Block],
        dim: int,
        classifier: str,
        stem: Callable[[Any, Tensor], Tensor],
        finish: Callable[[Any, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.net, self.blocks, self.dim = net, tuple(blocks), dim
        self.classifier_name = classifier  # where the net's family keeps its classifier, for exported names
        self._stem, self._finish = stem, finish

    def index(self, block: str) -> int:
        """Position of a block by name; ValueError lists the names there are."""
        names = [known.name for known in self.blocks]
        if block not in names:
            raise ValueError(f"block={block!r}: no such block; this backbone has {', '.join(names)}")
        return names.index(block)

    def stem(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) to what the first block takes."""
        return self._stem(self.net, x)

    def run(self, i: int, z: Tensor) -> Tensor:
        """Block number `i`."""
        return self.net.get_submodule(self.blocks[i].name)(z)  # type: ignore[no-any-return]

    def pool(self, i: int, z: Tensor) -> Tensor:
        """Features (B, dim) of block `i` from its activation: average over places, or the class token."""
        return z[:, 0] if self.blocks[i].pooling == "cls" else z.mean(dim=(2, 3))

    def finish(self, z: Tensor) -> Tensor:
        """The last block's activation to features (B, dim)."""
        return self._finish(self.net, z)


def from_resnet(net: ResNet, classifier: str = "fc") -> Backbone:
    """Any net with torchvision's ResNet layout: conv1, bn1, layer1.., average pooling."""

    def stem(net: Any, x: Tensor) -> Tensor:
        return net.maxpool(net.relu(net.bn1(net.conv1(x))))  # type: ignore[no-any-return]

    blocks = [
        Block(f"{stage}.{i}", _width(block), "average")
        for stage, layer in net.named_children()
        if stage.startswith("layer")
        for i, block in enumerate(layer)
    ]
    return Backbone(net, blocks, blocks[-1].dim, classifier, stem, lambda net, z: z.mean(dim=(2, 3)))


def _width(block: nn.Module) -> int:
    last = block.conv3 if isinstance(block, Bottleneck) else block.conv2
    return int(last.out_channels)  # type: ignore[arg-type, union-attr]


def from_vit(net: VisionTransformer) -> Backbone:
    """torchvision's vision transformer; features are class tokens."""

    def stem(net: Any, x: Tensor) -> Tensor:
        tokens = net._process_input(x)
        tokens = torch.cat([net.class_token.expand(len(x), -1, -1), tokens], dim=1)
        return net.encoder.dropout(tokens + net.encoder.pos_embedding)  # type: ignore[no-any-return]

    names = [f"encoder.layers.{name}" for name, _ in net.encoder.layers.named_children()]
    blocks = [Block(name, net.hidden_dim, "cls") for name in names]
    return Backbone(net, blocks, net.hidden_dim, "heads.head", stem, lambda net, z: net.encoder.ln(z)[:, 0])


class SmallResNet(nn.Module):
    """The CIFAR-style ResNet of He et al. 2015, section 4.2: depth 6n+2, three stages of n blocks, 3x3 stem."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or width_in != width:
        shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    first = BasicBlock(width_in, width, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))


class SmallResNetSpec(Spec):
    """resnet8, 14, 20 ... 56 for small images; `width` is that of the first stage."""

    kind: Literal["small_resnet"] = "small_resnet"
    name: Literal[
        "resnet8",
        "resnet14",
        "resnet20",
        "resnet26",
        "resnet32",
        "resnet38",
        "resnet44",
        "resnet50",
        "resnet56",
    ] = "resnet20"
    width: int = Field(16, ge=1)

    def build(self) -> Backbone:
        return from_resnet(SmallResNet(int(self.name.removeprefix("resnet")), self.width))


class TorchvisionSpec(Spec):
    """A torchvision ResNet or vision transformer by name; `weights` names published weights, for example DEFAULT."""

    kind: Literal["torchvision"] = "torchvision"
    name: str
    weights: str | None = None
    image_size: int = Field(224, ge=1)  # vision transformers have one position embedding for each patch

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = [n for n in torchvision.models.list_models(torchvision.models) if _family(n)]
        if name not in known:
            raise ValueError(f"unknown torchvision model; allowed are {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        known = [weights.name for weights in torchvision.models.get_model_weights(self.name)]
        if self.weights not in (None, "DEFAULT", *known):
            raise ValueError(f"weights={self.weights!r}: {self.name} has {', '.join(known)} and DEFAULT")
        return self

    def build(self) -> Backbone:
        sized = {"image_size": self.image_size} if _family(self.name) == "vit" else {}
        net = torchvision.models.get_model(self.name, weights=self.weights, **sized)
        if isinstance(net, VisionTransformer):
            net.heads = nn.Identity()
            return from_vit(net)
        net.fc = nn.Identity()
        return from_resnet(net)


def _family(name: str) -> Literal["resnet", "vit"] | None:
    if name.startswith("vit_"):
        return "vit"
    return "resnet" if name.startswith(("resnet", "resnext", "wide_resnet")) else None


BackboneSpec = Annotated[SmallResNetSpec | TorchvisionSpec, Field(discriminator="kind")]
