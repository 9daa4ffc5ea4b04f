"""The linear probe: multinomial logistic regression by L-BFGS on standardised features, to a stated tolerance.

Used as a fine-tuning method and for the source accuracy of every pre-trained model, with or without a classifier.
Letters: N samples, D feature dimensions, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nc_dist.data.subset import stratified

GRADIENT_TOLERANCE = 1e-5  # largest entry of the gradient of the mean loss
MAX_ITERATIONS = 500
VALIDATION_FRACTION = 0.2


@dataclass(frozen=True)
class LinearFit:
    """A classifier for raw features: logits = x @ weight.T + bias."""

    weight_KD: Tensor
    bias_K: Tensor
    l2: float
    validation_accuracy: float
    at_edge: bool  # the best strength is the grid's first or last: widen the grid

    def accuracy(self, feats_ND: Tensor, labels_N: Tensor) -> float:
        """Fraction of samples whose largest logit is their label's."""
        logits = feats_ND.double() @ self.weight_KD.T + self.bias_K
        return float((logits.argmax(1) == labels_N).double().mean())


def fit(feats_ND: Tensor, labels_N: Tensor, num_classes: int, l2: Sequence[float], seed: int) -> LinearFit:
    """Choose the l2 strength on a stratified fifth of the samples, then fit on all of them.

    The penalty is l2/2 |W|^2 on standardised features beside the mean cross-entropy; biases are free.
    """
    feats, labels = feats_ND.double(), labels_N.long()
    rest, held = (torch.from_numpy(part) for part in stratified(labels.cpu().numpy(), VALIDATION_FRACTION, seed))
    scores = []
    for strength in l2:
        candidate = _solve(feats[rest], labels[rest], num_classes, strength)
        logits = feats[held] @ candidate[0].T + candidate[1]
        scores.append(float((logits.argmax(1) == labels[held]).double().mean()))
    best = max(range(len(l2)), key=lambda i: (scores[i], l2[i]))  # of equals, the strongest penalty
    weight, bias = _solve(feats, labels, num_classes, l2[best])
    return LinearFit(weight, bias, l2[best], scores[best], at_edge=len(l2) > 1 and best in (0, len(l2) - 1))


def _solve(feats_ND: Tensor, labels_N: Tensor, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Weights (K, D) and bias (K,) for raw features, fp64."""
    mean, std = feats_ND.mean(0), feats_ND.std(0, correction=0)
    std = torch.where(std > 1e-12 * std.max().clamp(min=1e-300), std, torch.ones_like(std))  # constant features stay 0
    standard = (feats_ND - mean) / std
    weight = feats_ND.new_zeros(num_classes, feats_ND.shape[1], requires_grad=True)
    bias = feats_ND.new_zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(standard @ weight.T + bias, labels_N) + l2 / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    raw = weight.detach() / std
    return raw, bias.detach() - raw @ mean
