"""Squared error with the constants of a large comparison of losses on ImageNet."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from nc_dist.losses.mse import squared_distances
from nc_dist.losses.term import Loss
from nc_dist.outputs import Outputs


class SquaredError(Loss):
    """Mean over the batch of scale (kappa (z_y - M)^2 + sum_{j != y} z_j^2) (Kornblith et al. 2021, arXiv 2010.16402).

    Formula and defaults are those of the authors' release for ResNet-50 on ImageNet (github.com/google-research,
    loss_functions_transfer: kappa 9, m 60, loss_scale 10). It begins at about scale kappa M^2 = 324,000, so that the
    learning rate must be small, or the gradients clipped.
    """

    kind: Literal["squared_error"] = "squared_error"
    kappa: float = Field(9.0, gt=0)
    M: float = Field(60.0, gt=0)
    scale: float = Field(10.0, gt=0)

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return self.scale * squared_distances(outputs.logits, targets, self.kappa, self.M).mean()
