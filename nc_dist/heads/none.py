"""No projection head: the loss sees the backbone's features."""

from typing import Literal

from torch import nn

from nc_dist.spec import Spec


class NoHead(Spec):
    """(B, d) -> (B, d), unchanged."""

    kind: Literal["none"] = "none"

    def build(self, dim: int) -> tuple[nn.Module, int]:
        """The module and the size of what it puts out."""
        return nn.Identity(), dim
