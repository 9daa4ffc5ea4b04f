"""A projection head of linear layers with ReLU between them (as in SimCLR, Chen et al. 2020, and SupCon)."""

from itertools import pairwise
from typing import Literal

from pydantic import Field
from torch import nn

from nc_dist.heads.normalise import Normalise
from nc_dist.spec import Spec


class MLPHead(Spec):
    """(B, d) -> (B, output): `depth` linear layers, `hidden` wide between them (0: as wide as the features)."""

    kind: Literal["mlp"] = "mlp"
    depth: int = Field(2, ge=1, le=4)
    hidden: int = Field(0, ge=0)
    output: int = Field(128, ge=1)
    batch_norm: bool = False  # before each ReLU
    normalise_input: bool = False  # features divided by their length

    def build(self, dim: int) -> tuple[nn.Module, int]:
        """The module and the size of what it puts out."""
        widths = [dim, *[self.hidden or dim] * (self.depth - 1)]
        layers: list[nn.Module] = [Normalise()] if self.normalise_input else []
        for width_in, width_out in pairwise(widths):
            layers.append(nn.Linear(width_in, width_out, bias=not self.batch_norm))  # BatchNorm has one of its own
            layers += [nn.BatchNorm1d(width_out), nn.ReLU()] if self.batch_norm else [nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], self.output)), self.output
