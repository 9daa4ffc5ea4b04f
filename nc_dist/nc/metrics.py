"""Every metric of the moments by name, and `summary`, which computes them all. For `collapse`, `watch` and `nc show`.

The functions themselves stand by family in variability, geometry, transferability, gnc2, second_pass and spectrum; all
are offered here. A new one is a pure function of `Moments` and one line in MOMENT_METRICS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from nc_dist.nc.geometry import (
    nc2_equiangular,
    nc2_equinorm,
    nc2_etf,
    nc2_maximal_angle,
    nc3_bias,
    nc3_papyan,
    nc3_zhu,
    present_weight,
)
from nc_dist.nc.gnc2 import gnc2
from nc_dist.nc.second_pass import nc4, ncc_hits, nearest_centre
from nc_dist.nc.spectrum import class_ranks, numerical_rank, stable_rank
from nc_dist.nc.statistics import Moments, Statistics, Undefined, centred_means
from nc_dist.nc.transferability import cdnv, cdnv_unbiased, h_score, logme, nc1_trace_unbiased, vci
from nc_dist.nc.variability import (
    FLOOR_FACTOR,
    GAP_LIMIT,
    nc1,
    nc1_about,
    nc1_balanced,
    nc1_dof,
    nc1_floor,
    nc1_null,
    nc1_pca,
    nc1_rank,
    nc1_split_half,
    nc1_trace,
    nc1_weighted,
    rank,
)

__all__ = [
    "LIVE",
    "MOMENT_METRICS",
    "SLOW",
    "Summary",
    "Undefined",
    "cdnv",
    "cdnv_unbiased",
    "centred_means",
    "class_ranks",
    "gnc2",
    "h_score",
    "logme",
    "nc1",
    "nc1_about",
    "nc1_balanced",
    "nc1_dof",
    "nc1_floor",
    "nc1_null",
    "nc1_pca",
    "nc1_rank",
    "nc1_split_half",
    "nc1_trace",
    "nc1_trace_unbiased",
    "nc1_weighted",
    "nc2_equiangular",
    "nc2_equinorm",
    "nc2_etf",
    "nc2_maximal_angle",
    "nc3_bias",
    "nc3_papyan",
    "nc3_zhu",
    "nc4",
    "ncc_hits",
    "nearest_centre",
    "numerical_rank",
    "rank",
    "stable_rank",
    "summary",
    "vci",
]

Summary = dict[str, Any]

MOMENT_METRICS: dict[str, Callable[[Statistics], float]] = {
    "nc1": nc1,
    "rank": rank,
    "nc1_null": nc1_null,
    "nc1_floor": nc1_floor,
    "nc1_split_half": nc1_split_half,
    "nc1_pca": nc1_pca,
    "nc1_dof": nc1_dof,
    "nc1_balanced": nc1_balanced,
    "nc1_weighted": nc1_weighted,
    "nc1_rank": nc1_rank,
    "nc1_trace": nc1_trace,
    "nc1_trace_unbiased": nc1_trace_unbiased,
    "nc2_equinorm": lambda stats: nc2_equinorm(centred_means(stats)),
    "nc2_equiangular": lambda stats: nc2_equiangular(_few(centred_means(stats))),
    "nc2_maximal_angle": lambda stats: nc2_maximal_angle(_few(centred_means(stats))),
    "nc2_etf": lambda stats: nc2_etf(_few(centred_means(stats))),
    "gnc2": lambda stats: _crowded(stats, centred_means(stats)),
    "cdnv": cdnv,
    "cdnv_unbiased": cdnv_unbiased,
    "vci": vci,
    "h_score": h_score,
    "logme": logme,
}
CLASSIFIER_METRICS: dict[str, Callable[[Statistics, Tensor, Tensor | None], float]] = {
    "nc2_equinorm_weight": lambda stats, weight, _: nc2_equinorm(present_weight(stats, weight)),
    "nc2_equiangular_weight": lambda stats, weight, _: nc2_equiangular(_few(present_weight(stats, weight))),
    "nc2_maximal_angle_weight": lambda stats, weight, _: nc2_maximal_angle(_few(present_weight(stats, weight))),
    "nc2_etf_weight": lambda stats, weight, _: nc2_etf(_few(present_weight(stats, weight))),
    "nc3_papyan": lambda stats, weight, _: nc3_papyan(stats, weight),
    "nc3_zhu": lambda stats, weight, _: nc3_zhu(stats, _few(weight)),
    "nc3_bias": nc3_bias,
    "gnc2_weight": lambda stats, weight, _: _crowded(stats, present_weight(stats, weight)),
}
MOST_ROWS = 4096  # that a summary compares in pairs: 0.13 GB a matrix, ten seconds of gnc2 on one CPU thread
BARELY = 0.8  # of the null: features that hardly know of the classes
FEWEST = 4  # samples a class whose halves have a variability
SLOW = ("logme", "gnc2", "gnc2_weight")
LIVE = frozenset({*MOMENT_METRICS, *CLASSIFIER_METRICS} - {*SLOW})  # what is worth its time again and again in training


def summary(
    moments: Moments,
    weight_KD: Tensor | None = None,
    bias_K: Tensor | None = None,
    only: Collection[str] | None = None,
) -> Summary:
    """All metrics of the moments, or `only` some, with the numbers they are to be read with; ready for JSON.

    d, K non-empty and K_empty empty classes, N samples, n_min and n_max of non-empty classes. `*_weight` are of the
    classifier, which must act on these very features. A metric without a value is None, never NaN: `reasons` says why.
    `warnings` says which numbers are not to be trusted.
    """
    stats = moments.statistics()
    metrics: dict[str, Callable[[], float]] = {}
    for name, metric in MOMENT_METRICS.items():
        metrics[name] = lambda metric=metric: metric(stats)  # type: ignore[misc]
    for name, of_both in CLASSIFIER_METRICS.items():
        metrics[name] = lambda of_both=of_both: of_both(stats, _given(weight_KD), bias_K)  # type: ignore[misc]
    values, reasons = _sizes(stats), dict[str, str]()
    for name, compute in metrics.items():
        if only is None or name in only:
            try:
                values[name] = compute()
                if not math.isfinite(values[name]):
                    raise Undefined("not finite: the features are too large or too small for fp64, rescale them")
            except Undefined as why:
                values[name], reasons[name] = None, str(why)
    return {**values, "reasons": reasons, "warnings": warnings(values)}


def warnings(values: Summary) -> list[str]:
    """What speaks against NC1 of this summary."""
    found = []
    gap, floor, value, rank_used = (values.get(name) for name in ("nc1_split_half", "nc1_floor", "nc1", "rank"))
    full_rank = min(values["K"] - 1, values["d"])
    if rank_used is not None and rank_used < full_rank:
        found.append(f"rank {rank_used} of {full_rank}: NC1 leaves out directions in which class means nearly agree")
    null = values.get("nc1_null")
    if value is not None and null is not None and value > BARELY * null:
        found.append(f"NC1 = {value:.3g} is about what permuted labels give ({null:.3g})")
    if value is not None and gap is None and values["n_min"] < FEWEST:
        found.append(f"n = {values['n_min']} a class is too small to tell how far NC1 can be trusted")
    if gap is not None and gap > GAP_LIMIT:
        sizes = f"n = {values['n_min']}" + (f"-{values['n_max']}" if values["n_max"] > values["n_min"] else "")
        found.append(f"{sizes} a class is too small: halves of the samples give an NC1 that differs by {gap:.0%}")
    if value is not None and floor is not None and value < FLOOR_FACTOR * floor:
        found.append(f"NC1 = {value:.2g} is below {FLOOR_FACTOR} x {floor:.2g}, what rounding of the features makes")
    return found


def _sizes(stats: Statistics) -> Summary:
    counts = [int(n) for n in stats.counts_P]
    sizes = {"d": stats.dim, "K": len(counts), "K_empty": len(stats.n_K) - len(counts)}
    return {**sizes, "N": sum(counts), "n_min": min(counts, default=0), "n_max": max(counts, default=0)}


def _given(weight_KD: Tensor | None) -> Tensor:
    if weight_KD is None:
        raise Undefined("no classifier")
    return weight_KD


def _crowded(stats: Statistics, rows_PD: Tensor) -> float:
    """GNC2, which takes the place of NC2 when there are more classes than dimensions."""
    if len(rows_PD) <= stats.dim:
        raise Undefined(f"K = {len(rows_PD)} is not above d = {stats.dim}: see nc2_etf")
    return gnc2(_few(rows_PD))


def _few(rows_PD: Tensor) -> Tensor:
    """The rows, where comparing all pairs of them is no matter of gigabytes and minutes."""
    if len(rows_PD) > MOST_ROWS:
        raise Undefined(f"K = {len(rows_PD)}: all pairs of more than {MOST_ROWS} classes; call the metric by itself")
    return rows_PD
