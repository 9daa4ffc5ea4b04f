"""Backbones: nets cut at their blocks, and where they come from. One file for each family and each origin."""

import difflib
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from nc_dist.backbones.cut import Backbone, Block
from nc_dist.backbones.own import OwnSpec
from nc_dist.backbones.resnet import from_resnet
from nc_dist.backbones.small_resnet import SmallResNet, SmallResNetSpec
from nc_dist.backbones.timm_nets import TimmSpec
from nc_dist.backbones.torchvision_nets import TorchvisionSpec
from nc_dist.backbones.vit import from_vit

NAMED = ("small_resnet", "torchvision", "timm")  # kinds of which a name can be all that is said


def spelled_out(block: Any) -> Any:
    """`timm:NAME` as the block with this kind and name, so for other kinds that have names; or `module:function`."""
    if not isinstance(block, str):
        return block
    kind, colon, name = block.partition(":")
    if kind in NAMED:
        return {"kind": kind, "name": name}
    if not colon or kind == "own" or difflib.get_close_matches(kind, NAMED, 1):
        known = ", ".join(f"{kind}:NAME" for kind in NAMED)
        raise ValueError(f"expected a block with the key 'kind', {known}, or module:function of your own")
    return {"kind": "own", "function": block}


BackboneSpec = Annotated[
    SmallResNetSpec | TorchvisionSpec | TimmSpec | OwnSpec, Field(discriminator="kind"), BeforeValidator(spelled_out)
]

__all__ = [
    "Backbone",
    "BackboneSpec",
    "Block",
    "OwnSpec",
    "SmallResNet",
    "SmallResNetSpec",
    "TimmSpec",
    "TorchvisionSpec",
    "from_resnet",
    "from_vit",
]
