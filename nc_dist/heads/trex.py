"""The projector of t-ReX (Sariyildiz et al. 2023, arXiv 2206.15369), which trades source accuracy for transfer."""

from typing import Literal

from pydantic import Field
from torch import nn

from nc_dist.heads.normalise import Normalise
from nc_dist.spec import Spec


class TRexHead(Spec):
    """(B, d) -> (B, output): unit features, hidden layers of linear, BatchNorm and GELU, then a linear bottleneck.

    t-ReX has 3 hidden layers, t-ReX* 1. Its loss is cross-entropy of cosines over a temperature of 0.1.
    """

    kind: Literal["trex"] = "trex"
    hidden_layers: int = Field(3, ge=1)
    hidden: int = Field(2048, ge=1)
    output: int = Field(256, ge=1)
    normalise_input: bool = True

    def build(self, dim: int) -> tuple[nn.Module, int]:
        """The module and the size of what it puts out."""
        layers: list[nn.Module] = [Normalise()] if self.normalise_input else []
        for width_in in [dim, *[self.hidden] * (self.hidden_layers - 1)]:
            layers += [nn.Linear(width_in, self.hidden), nn.BatchNorm1d(self.hidden), nn.GELU()]
        layers.append(nn.Linear(self.hidden, self.output, bias=False))
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        return nn.Sequential(*layers), self.output
