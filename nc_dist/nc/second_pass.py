"""What takes a second look at the features, with the final class means: NC4, nearest centres, per-class NC1.

Works in the span of the means: Z = (x - mu_y) Y^T, where Y^T Y = Sigma_B^+. Fed by `collapse` and `watch`.

Letters: B samples of a batch, K all classes, P non-empty classes, D feature dimensions, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nc_dist.nc.geometry import expect, present_bias, present_weight
from nc_dist.nc.moments import SumFn
from nc_dist.nc.statistics import Moments, Statistics, Undefined
from nc_dist.nc.transferability import h_score_shrunk, vci_shrunk

Classifier = tuple[Tensor, Tensor | None]  # weight (K, D) and bias (K,)


class SecondPass:
    """Sums over samples; `metrics` reduces them. `moments` are of all ranks, `classifier` acts on these features."""

    def __init__(self, moments: Moments, classifier: Classifier | None = None) -> None:
        self._stats = moments.statistics()
        self._classifier = classifier
        self._roots = _roots(self._stats)
        zeros_K = torch.zeros_like(self._stats.n_K)
        self._squares = {name: zeros_K.clone() for name in self._roots}  # sum_{i in k} |Z_i|^2
        self._counts = zeros_K.new_zeros(4)  # samples, nearest to their own centre, NC4 agreements, |x - mu_G|^4

    def update(self, feats_BD: Tensor, labels_B: Tensor) -> None:
        """Add a batch of the features that the moments were made of."""
        stats = self._stats
        exact_BD = _exact(feats_BD, stats)
        expect("labels", labels_B, tuple(feats_BD.shape[:1]))
        if labels_B.is_floating_point() or not torch.isin(labels_B.long(), stats.present_P).all():
            found = f"labels {sorted(set(labels_B.tolist()))[:9]} {labels_B.dtype}"
            raise ValueError(f"{found}: expected classes that the moments have samples of")
        labels_B = labels_B.long()
        nearest_B = nearest_centre(exact_BD, stats)
        agree = 0
        if self._classifier is not None:
            agree = int((_chosen(exact_BD, stats, self._classifier) == nearest_B).sum())
        hits = int((nearest_B == labels_B).sum())
        quartic = float((exact_BD - stats.global_mean_D).square().sum(1).square().sum())
        self._counts += torch.tensor([len(labels_B), hits, agree, quartic], dtype=torch.float64).to(self._counts.device)
        residuals_BD = exact_BD - stats.means_KD[labels_B]
        for name, root_RD in self._roots.items():
            self._squares[name].index_add_(0, labels_B, (residuals_BD @ root_RD.T).square().sum(1))

    def metrics(self, sum_fn: SumFn) -> dict[str, Any]:
        """nc4, ncc_acc1, nc1_per_class, nc1_balanced and shrunk scores over all ranks; every rank must call it.

        What has no value is None, `reasons` says why.
        """
        samples, hits, agree, quartic = sum_fn(self._counts.clone()).tolist()
        squares = {name: sum_fn(sums_K.clone())[self._stats.present_P] for name, sums_K in self._squares.items()}
        classes, counts_P = len(self._stats.present_P), self._stats.counts_P
        values: dict[str, Any] = {"ncc_acc1": hits / samples if samples else None}
        reasons: dict[str, str] = {} if samples else {"ncc_acc1": "no samples"}
        values["nc4"] = agree / samples if self._classifier is not None and samples else None
        if values["nc4"] is None:
            reasons["nc4"] = "no classifier" if samples else "no samples"
        values["nc1_per_class"] = values["nc1_balanced"] = None
        if "pooled" not in squares:
            reasons |= dict.fromkeys(("nc1_per_class", "nc1_balanced"), "class means that coincide, or fewer than two")
        else:
            per_class = dict(zip(self._stats.present_P.tolist(), squares["pooled"] / counts_P / classes, strict=True))
            every = range(len(self._stats.n_K))
            values["nc1_per_class"] = [float(per_class[k]) if k in per_class else None for k in every]
            values["nc1_balanced"] = float((squares["balanced"] / counts_P).sum() / classes**2)
        for name, metric in (("h_score_shrunk", h_score_shrunk), ("vci_shrunk", vci_shrunk)):
            try:
                values[name] = metric(self._stats, quartic)
            except Undefined as why:
                values[name], reasons[name] = None, str(why)
        return {**values, "reasons": reasons}


def nc4(feats_BD: Tensor, moments: Moments, weight_KD: Tensor, bias_K: Tensor | None = None) -> tuple[int, int]:
    """How many samples have argmax_k (w_k x + b_k) = argmin_k |x - mu_k| over non-empty classes; of how many.

    NC4 (Papyan et al. 2020) is their fraction: sum both over batches and ranks, then divide.
    """
    stats = moments.statistics()
    exact_BD = _exact(feats_BD, stats)
    return int((_chosen(exact_BD, stats, (weight_KD, bias_K)) == nearest_centre(exact_BD, stats)).sum()), len(feats_BD)


def ncc_hits(feats_BD: Tensor, labels_B: Tensor, moments: Moments) -> tuple[int, int]:
    """How many samples lie nearest to their own class mean; of how many: nearest-class-centre accuracy."""
    expect("labels", labels_B, tuple(feats_BD.shape[:1]))
    return int((labels_B == nearest_centre(feats_BD, moments)).sum()), len(feats_BD)


def nearest_centre(feats_BD: Tensor, moments: Moments) -> Tensor:
    """argmin_k |x - mu_k| over non-empty classes: (B,) int64.

    As argmax_k m_k z - |m_k|^2/2, where z = x - mu_G and m_k = mu_k - mu_G: free of |x|^2 and of a common
    offset, in which the differences between classes would drown.
    """
    stats = moments.statistics()
    centre_D = stats.global_mean_D
    centred_PD = stats.means_KD[stats.present_P] - centre_D
    scores_BP = (_exact(feats_BD, stats) - centre_D) @ centred_PD.T - centred_PD.square().sum(1) / 2
    return stats.present_P[scores_BP.argmax(1)]


def combined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """A summary of moments with what the second pass adds or can give a value at last."""
    reasons = {**first["reasons"], **second["reasons"]}
    values = {**first, **second}
    return {**values, "reasons": {name: why for name, why in reasons.items() if values.get(name) is None}}


def _roots(stats: Statistics) -> dict[str, Tensor]:
    """Y of the pooled and of the class-balanced convention; none where NC1 has no value."""
    try:
        alike = replace(stats, n_K=(stats.n_K > 0).double())  # mu_G becomes the mean of the class means
        return {"pooled": stats.root[0], "balanced": alike.root[0]}
    except Undefined:
        return {}


def _chosen(exact_BD: Tensor, stats: Statistics, classifier: Classifier) -> Tensor:
    """The classifier's choice among non-empty classes: (B,) int64."""
    weight_KD, bias_K = classifier
    logits_BP = exact_BD @ present_weight(stats, weight_KD).T + present_bias(stats, bias_K)
    return stats.present_P[logits_BP.argmax(1)]


def _exact(feats_BD: Tensor, stats: Statistics) -> Tensor:
    expect("features", feats_BD, (len(feats_BD), stats.dim))
    return feats_BD.detach().double()
