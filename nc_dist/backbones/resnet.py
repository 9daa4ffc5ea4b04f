"""ResNet, ResNeXt and Wide ResNet in torchvision's layout: conv1, bn1, layer1.., average pooling, fc."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nc_dist.backbones.cut import Backbone, Block, width


def from_resnet(net: nn.Module, classifier: str = "fc") -> Backbone:
    """Any net with this layout, its classifier taken off; the blocks are the residual ones."""

    def stem(net: Any, x: Tensor) -> Tensor:
        return net.maxpool(net.relu(net.bn1(net.conv1(x))))  # type: ignore[no-any-return]

    blocks = [Block(name, width(net.get_submodule(name)), "average") for name in residual_blocks(net)]
    return Backbone(net, blocks, blocks[-1].dim, classifier, stem, lambda net, z: z.mean(dim=(2, 3)))


def residual_blocks(net: nn.Module) -> list[str]:
    """Names of the members of layer1, layer2, .."""
    stages = [(name, stage) for name, stage in net.named_children() if name.startswith("layer")]
    return [f"{name}.{i}" for name, stage in stages for i, _ in stage.named_children()]


def small_stem(net: Any) -> None:
    """For small images: a 3x3 convolution of stride 1 and no pooling (He et al. 2015, section 4.2), torchvision's init.

    To load an export of such a net into torchvision's own class, give that class the same `conv1` and `maxpool`.
    """
    net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
