"""Losses and regularisers: one file each, one name in a union below. Pure torch.

All are called as term(outputs, targets) and say what they want by class variables and properties: see `Loss` in
term.py. The loop hands a coupled one the outputs of the whole global batch, gathered over ranks and micro-batches, all
first views before all second ones.
"""

from typing import Annotated

from pydantic import Field

from nc_dist.losses.bce import BCE
from nc_dist.losses.ce import CrossEntropy
from nc_dist.losses.cosine_softmax import CosineSoftmax
from nc_dist.losses.feature_norm import FeatureNorm
from nc_dist.losses.focal import Focal
from nc_dist.losses.koleo import KoLeo
from nc_dist.losses.label_smoothing import LabelSmoothing
from nc_dist.losses.logit_norm import LogitNorm
from nc_dist.losses.logit_penalty import LogitPenalty
from nc_dist.losses.mse import MSE
from nc_dist.losses.squared_error import SquaredError
from nc_dist.losses.supcon import SupCon
from nc_dist.losses.term import Loss, Regulariser
from nc_dist.losses.within_class import WithinClass

LossSpec = Annotated[
    CrossEntropy
    | LabelSmoothing
    | Focal
    | MSE
    | SquaredError
    | BCE
    | CosineSoftmax
    | LogitNorm
    | LogitPenalty
    | SupCon,
    Field(discriminator="kind"),
]
RegulariserSpec = Annotated[KoLeo | FeatureNorm | WithinClass, Field(discriminator="kind")]

__all__ = [
    "BCE",
    "CosineSoftmax",
    "CrossEntropy",
    "FeatureNorm",
    "Focal",
    "KoLeo",
    "LabelSmoothing",
    "LogitNorm",
    "LogitPenalty",
    "Loss",
    "LossSpec",
    "MSE",
    "Regulariser",
    "RegulariserSpec",
    "SquaredError",
    "SupCon",
    "WithinClass",
]
