"""A projection head of linear layers with ReLU between them (as in SimCLR, Chen et al. 2020, and SupCon)."""

from itertools import pairwise
from typing import Literal

from pydantic import Field
from torch import nn

from nc_dist.spec import Spec


class MLPHead(Spec):
    """(B, d) -> (B, output): `depth` linear layers, `hidden` wide between them (0: as wide as the features)."""

    kind: Literal["mlp"] = "mlp"
    depth: int = Field(2, ge=1, le=4)
    hidden: int = Field(0, ge=0)
    output: int = Field(128, ge=1)

    def build(self, dim: int) -> tuple[nn.Module, int]:
        """The module and the size of what it puts out."""
        widths = [dim, *[self.hidden or dim] * (self.depth - 1), self.output]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1]), self.output
