"""Losses and regularisers: one file each, one name in a union below. Pure torch.

All are called as term(outputs, targets) and say by class variables what they want: see `Loss` in term.py. The loop
hands a coupled one the outputs of the whole global batch, gathered over ranks and micro-batches, all first views before
all second ones.
"""

from typing import Annotated

from pydantic import Field

from nc_dist.losses.ce import CrossEntropy
from nc_dist.losses.feature_norm import FeatureNorm
from nc_dist.losses.supcon import SupCon
from nc_dist.losses.term import Loss, Regulariser

LossSpec = Annotated[CrossEntropy | SupCon, Field(discriminator="kind")]
RegulariserSpec = Annotated[FeatureNorm, Field(discriminator="kind")]

__all__ = ["CrossEntropy", "FeatureNorm", "Loss", "LossSpec", "Regulariser", "RegulariserSpec", "SupCon"]
