"""A penalty on the length of features, which cross-entropy alone lets grow without bound."""

from typing import Literal

from torch import Tensor

from nc_dist.losses.term import Regulariser
from nc_dist.outputs import Outputs


class FeatureNorm(Regulariser):
    """Mean over the batch of |h|^2 / 2, h the features before the head (unconstrained-features models penalise them so,
    Zhu et al. 2021, arXiv 2105.02375, lambda_H)."""

    kind: Literal["feature_norm"] = "feature_norm"

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return outputs.features_Bd.square().sum(1).mean() / 2
