"""Sigmoid cross-entropy: each class is a question of its own."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from nc_dist.losses.term import Loss, probabilities
from nc_dist.outputs import Outputs


class BCE(Loss):
    """Mean over the batch of -sum_k [t_k log s(z_k) + (1 - t_k) log(1 - s(z_k))], s the sigmoid: summed over classes as
    in Kornblith et al. 2021 (arXiv 2010.16402). `reduction: mean` divides by K.

    Kornblith et al. also take log K off all logits; here the sum begins at about K log 2, and the biases learn it.
    """

    kind: Literal["bce"] = "bce"
    reduction: Literal["mean", "sum"] = "sum"  # over classes

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        target_BK = probabilities(targets, outputs.logits)
        value = F.binary_cross_entropy_with_logits(outputs.logits, target_BK, reduction="sum") / len(target_BK)
        return value / target_BK.shape[1] if self.reduction == "mean" else value
