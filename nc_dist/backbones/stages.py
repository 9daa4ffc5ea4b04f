"""torchvision's nets that are a sequence `features`, average pooling and a sequence `classifier`: MobileNet, ConvNeXt.

What `classifier` does before its last layer (a norm, or a hidden layer, or dropout) is a part of the backbone: features
are what enters the classifier proper.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models import ConvNeXt

from nc_dist.backbones.cut import Backbone, Block, width

SMALL_PATCH = 2  # pixels, of ConvNeXt's stem


def from_stages(net: Any, dim: int) -> Backbone:
    """The net with its classifier, which took `dim` features, taken off.

    Blocks are what follows the stem: MobileNet's, and ConvNeXt's residual blocks with the downsampling layers between
    its stages.
    """

    def finish(net: Any, z: Tensor) -> Tensor:
        return net.classifier(net.avgpool(z) if isinstance(net, ConvNeXt) else z.mean(dim=(2, 3)))  # type: ignore[no-any-return]

    names = [f"features.{i}" for i in range(1, len(net.features))]
    if isinstance(net, ConvNeXt):
        names = [name for stage in names for name in _residual_or_downsampling(net, stage)]
    blocks = [Block(name, width(net.get_submodule(name)), "average") for name in names]
    last = f"classifier.{len(net.classifier) - 1}"
    return Backbone(net, blocks, dim, last, lambda net, x: net.features[0](x), finish)


def _residual_or_downsampling(net: ConvNeXt, stage: str) -> list[str]:
    members = dict(net.get_submodule(stage).named_children())
    residual = not any(isinstance(member, nn.Conv2d) for member in members.values())
    return [f"{stage}.{i}" for i in members] if residual else [stage]


def small_stem(net: Any) -> None:
    """For small images: patches of SMALL_PATCH pixels in ConvNeXt, torchvision's init; stride 1 in MobileNet.

    To load an export of such a net into torchvision's own class, give that class the same `features[0][0]`, in
    MobileNet the stride alone.
    """
    first = net.features[0][0]
    if not isinstance(net, ConvNeXt):
        first.stride = (1, 1)
        return
    net.features[0][0] = nn.Conv2d(3, first.out_channels, SMALL_PATCH, SMALL_PATCH)
    nn.init.trunc_normal_(net.features[0][0].weight, std=0.02)
    nn.init.zeros_(net.features[0][0].bias)
