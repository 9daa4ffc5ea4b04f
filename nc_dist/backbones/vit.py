"""torchvision's vision transformers; features are class tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from nc_dist.backbones.cut import Backbone, Block

SMALL_PATCH = 4  # pixels


def from_vit(net: VisionTransformer) -> Backbone:
    """The net with its classifier taken off; the blocks are the encoder's layers."""

    def stem(net: Any, x: Tensor) -> Tensor:
        tokens = net._process_input(x)
        tokens = torch.cat([net.class_token.expand(len(x), -1, -1), tokens], dim=1)
        return net.encoder.dropout(tokens + net.encoder.pos_embedding)  # type: ignore[no-any-return]

    names = [f"encoder.layers.{name}" for name, _ in net.encoder.layers.named_children()]
    blocks = [Block(name, net.hidden_dim, "cls") for name in names]
    return Backbone(net, blocks, net.hidden_dim, "heads.head", stem, lambda net, z: net.encoder.ln(z)[:, 0])


def small_patches(net: VisionTransformer, image_size: int) -> None:
    """Patches of SMALL_PATCH pixels, of a net that was built for as many patches; torchvision's init.

    To load an export of such a net into torchvision's own class, build it with this patch and image size.
    """
    assert (net.image_size // net.patch_size) ** 2 == (image_size // SMALL_PATCH) ** 2
    net.image_size, net.patch_size = image_size, SMALL_PATCH
    net.conv_proj = nn.Conv2d(3, net.hidden_dim, SMALL_PATCH, SMALL_PATCH)
    nn.init.trunc_normal_(net.conv_proj.weight, std=(3 * SMALL_PATCH**2) ** -0.5)
    nn.init.zeros_(net.conv_proj.bias)
