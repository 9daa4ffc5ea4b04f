"""The ResNets for small images: resnet8, resnet20 .. resnet56."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn
from torchvision.models.resnet import BasicBlock

from nc_dist.backbones.cut import Backbone
from nc_dist.backbones.origin import Origin
from nc_dist.backbones.resnet import from_resnet


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


class SmallResNetSpec(Origin):
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
