"""A projection head of one linear layer."""

from typing import Literal

from pydantic import Field
from torch import nn

from nc_dist.spec import Spec


class LinearHead(Spec):
    """(B, d) -> (B, output)."""

    kind: Literal["linear"] = "linear"
    output: int = Field(128, ge=1)

    def build(self, dim: int) -> tuple[nn.Module, int]:
        """The module and the size of what it puts out."""
        return nn.Linear(dim, self.output), self.output
