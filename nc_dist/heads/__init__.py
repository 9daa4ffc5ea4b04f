"""Projection heads: trained on top of the backbone's features, dropped at transfer. One file each."""

from typing import Annotated

from pydantic import Field

from nc_dist.heads.mlp import MLPHead
from nc_dist.heads.none import NoHead

HeadSpec = Annotated[NoHead | MLPHead, Field(discriminator="kind")]

__all__ = ["HeadSpec", "MLPHead", "NoHead"]
