"""Mean squared error of the logits: the label's own is drawn to M, all others to 0."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from nc_dist.losses.term import Loss, probabilities
from nc_dist.outputs import Outputs


def squared_distances(logits_BK: Tensor, targets: Tensor, kappa: float, M: float) -> Tensor:
    """kappa (z_y - M)^2 + sum_{j != y} z_j^2 of each sample, (B,); of probabilities, their mean over y."""
    target_BK = probabilities(targets, logits_BK)
    return (target_BK * kappa * (logits_BK - M).square() + (1 - target_BK) * logits_BK.square()).sum(1)


class MSE(Loss):
    """Mean over the batch of kappa (z_y - M)^2 + sum_{j != y} z_j^2 (Hui and Belkin 2021, arXiv 2006.07322).

    `reduction: mean` divides by the number of classes K, as torch's mse_loss does and as Zhou et al. 2022 (arXiv
    2210.02192) train with M = 15; the best learning rate changes with it, by a factor of about K.
    """

    kind: Literal["mse"] = "mse"
    kappa: float = Field(1.0, gt=0)
    M: float = Field(15.0, gt=0)
    reduction: Literal["mean", "sum"] = "mean"  # over classes

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        value = squared_distances(outputs.logits, targets, self.kappa, self.M).mean()
        return value / outputs.logits.shape[1] if self.reduction == "mean" else value
