"""Fine-tuning methods: one file each. A method freezes and wraps a source model for a downstream set.

`apply(source, num_classes, seed) -> Model`: exactly the parameters that are to be trained require gradients. Layers
without any are put in eval mode by `train_mode`, so that frozen BatchNorm keeps the source's statistics.
"""

from typing import Annotated

from pydantic import Field

from nc_dist.methods.full import Full
from nc_dist.methods.layer_ft import LayerFT
from nc_dist.methods.linear_probe import LinearProbe
from nc_dist.methods.scl_ft import SCLFT

MethodSpec = Annotated[LinearProbe | LayerFT | SCLFT | Full, Field(discriminator="kind")]

__all__ = ["Full", "LayerFT", "LinearProbe", "MethodSpec", "SCLFT"]
