"""Neural-collapse metrics NC1 to NC4: pure functions of `Statistics`, all in fp64. Called by `measure`.

Convention of the plain names (Papyan, Han & Donoho 2020, arXiv 2008.08186, and the code of Zhu et al. 2021,
arXiv 2105.02375): Sigma_W = S/N pooled, Sigma_B = (1/K) sum_k (mu_k - mu_G)(mu_k - mu_G)^T unweighted,
mu_G the mean over samples, K the number of non-empty classes, no correction for degrees of freedom.

Letters: B samples of a batch, C all classes, K non-empty classes, D feature dimensions, R rank of Sigma_B.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nc_dist.nc.moments import Statistics

Summary = dict[str, float | int | None | dict[str, str]]

EIGENVALUE_CUTOFF = 1e-12  # of the largest of Sigma_B: a weaker direction has under four digits left in fp64
COINCIDENT = 1e-13  # of the largest norm of a class mean: means as close as this differ by rounding alone


class Undefined(ValueError):
    """The metric has no value for these statistics; the message says why."""


class NC1(NamedTuple):
    """NC1, and the rank of Sigma_B its pseudo-inverse used: min(K-1, D) unless the means are dependent."""

    value: float
    rank: int


def present_classes(stats: Statistics) -> Tensor:
    """The non-empty classes, ascending: (K,) int64."""
    return stats.n_K.nonzero().flatten()


def global_mean(stats: Statistics) -> Tensor:
    """mu_G, the mean of all samples: (D,). Raises Undefined without samples."""
    if not stats.n_K.any():
        raise Undefined("no samples")
    return (stats.n_K / stats.n_K.sum()) @ stats.means_KD


def centred_means(stats: Statistics) -> Tensor:
    """Rows mu_k - mu_G of the non-empty classes: (K, D). Undefined for one class or coincident means."""
    centred_KD = (stats.means_KD - global_mean(stats))[present_classes(stats)]
    if len(centred_KD) < 2:
        raise Undefined("only one class has samples")
    return _not_coincident(centred_KD, stats)


def nc1(stats: Statistics) -> NC1:
    """Within-class variability, (1/K) tr(Sigma_W Sigma_B^+): 0 is collapsed (Papyan et al. 2020, NC1)."""
    return _nc1(centred_means(stats), stats.n_K[present_classes(stats)], stats.scatter_DD)


def nc1_trace(stats: Statistics) -> float:
    """tr Sigma_W / tr Sigma_B (Tirer et al. 2023, the quotient form of NC1)."""
    between = centred_means(stats).square().sum(1).mean()
    return float(stats.within_K.sum() / stats.n_K.sum() / between)


def nc1_pca(stats: Statistics) -> float:
    """NC1 within the top d0 = 2K principal directions of the features: comparable over layers and models.

    They are eigenvectors of the total scatter Sigma_T = S/N + sum_k (n_k/N)(mu_k - mu_G)(mu_k - mu_G)^T.
    Raises Undefined when D < d0. Takes O(D^3).
    """
    centred_KD, n_K = centred_means(stats), stats.n_K[present_classes(stats)]
    kept, dim = 2 * len(n_K), centred_KD.shape[1]
    if dim < kept:
        raise Undefined(f"not comparable: D = {dim} is less than d0 = 2K = {kept}")
    weighted_KD = centred_KD * n_K.sqrt()[:, None]
    basis = torch.linalg.eigh(stats.scatter_DD + weighted_KD.T @ weighted_KD).eigenvectors[:, -kept:]
    return _nc1(_not_coincident(centred_KD @ basis, stats), n_K, basis.T @ stats.scatter_DD @ basis).value


def nc2_equinorm(rows_KD: Tensor) -> float:
    """std_k |r_k| / mean_k |r_k| (Papyan et al. 2020, NC2); rows: `centred_means` or a classifier's weight.

    The std is of the K values themselves; code with torch's default std gives sqrt(K/(K-1)) times as much.
    """
    norms_K = _rows(rows_KD).norm(dim=1)
    if not norms_K.any():
        raise Undefined("all rows are zero")
    return float(norms_K.std(correction=0) / norms_K.mean())


def nc2_equiangular(rows_KD: Tensor) -> float:
    """std over pairs i != j of cos(r_i, r_j) (Papyan et al. 2020, NC2)."""
    return float(_cosines(rows_KD).std(correction=0))


def nc2_maximal_angle(rows_KD: Tensor) -> float:
    """Mean over pairs i != j of |cos(r_i, r_j) + 1/(K-1)| (Papyan et al. 2020, NC2)."""
    return float((_cosines(rows_KD) + 1 / (len(rows_KD) - 1)).abs().mean())


def nc2_etf(rows_KD: Tensor) -> float:
    """| G/|G|_F - (K-1)^{-1/2} (I - 11^T/K) |_F with G = R R^T (Zhu et al. 2021, NC2)."""
    return _distance_to_etf(_rows(rows_KD) @ _rows(rows_KD).T)


def nc3_papyan(stats: Statistics, weight_CD: Tensor) -> float:
    """Self-duality | W/|W|_F - M/|M|_F |_F, M = `centred_means`, non-empty classes (Papyan et al. 2020)."""
    return float((_unit(_weight(stats, weight_CD)) - _unit(centred_means(stats))).norm())


def nc3_zhu(stats: Statistics, weight_CD: Tensor) -> float:
    """Self-duality | G/|G|_F - (K-1)^{-1/2} (I - 11^T/K) |_F, G = W M^T, non-empty classes (Zhu 2021)."""
    return _distance_to_etf(_weight(stats, weight_CD) @ centred_means(stats).T)


def nc3_bias(stats: Statistics, weight_CD: Tensor, bias_C: Tensor | None = None) -> float:
    """|W mu_G + b|_2 over non-empty classes, in logits (Zhu et al. 2021); without a bias b = 0."""
    return float((_weight(stats, weight_CD) @ global_mean(stats) + _bias(stats, bias_C)).norm())


def nc4(feats_BD: Tensor, stats: Statistics, weight_CD: Tensor, bias_C: Tensor | None = None) -> tuple[int, int]:
    """How many samples have argmax_k (w_k x + b_k) = argmin_k |x - mu_k| over non-empty classes; of how many.

    NC4 (Papyan et al. 2020) is their fraction: sum both over batches and ranks, then divide.
    """
    logits_BK = _features(feats_BD, stats) @ _weight(stats, weight_CD).T + _bias(stats, bias_C)
    chosen_B = present_classes(stats)[logits_BK.argmax(1)]
    return int((chosen_B == nearest_centre(feats_BD, stats)).sum()), len(feats_BD)


def ncc_hits(feats_BD: Tensor, labels_B: Tensor, stats: Statistics) -> tuple[int, int]:
    """How many samples lie nearest to their own class mean; of how many: nearest-class-centre accuracy."""
    _expect("labels", labels_B, feats_BD.shape[:1])
    return int((labels_B == nearest_centre(feats_BD, stats)).sum()), len(feats_BD)


def nearest_centre(feats_BD: Tensor, stats: Statistics) -> Tensor:
    """argmin_k |x - mu_k| over non-empty classes: (B,) int64.

    As argmax_k m_k z - |m_k|^2/2, where z = x - mu_G and m_k = mu_k - mu_G: free of |x|^2 and of a common
    offset, in which the differences between classes would drown.
    """
    centre_D, present_K = global_mean(stats), present_classes(stats)
    centred_KD = stats.means_KD[present_K] - centre_D
    scores_BK = (_features(feats_BD, stats) - centre_D) @ centred_KD.T - centred_KD.square().sum(1) / 2
    return present_K[scores_BK.argmax(1)]


def summary(stats: Statistics, weight_CD: Tensor | None = None, bias_C: Tensor | None = None) -> Summary:
    """All metrics of the statistics, with the numbers they are to be read with; ready for JSON.

    d, K non-empty and K_empty empty classes, N samples, n_min and n_max of non-empty classes, rank of `NC1`.
    `nc2_*_weight` are of the classifier. A metric without a value is None, never NaN: `reasons` says why.
    """

    def weight() -> Tensor:
        if weight_CD is None:
            raise Undefined("no classifier")
        return weight_CD

    solved = cache(lambda: nc1(stats))
    metrics: dict[str, Callable[[], float]] = {
        "nc1": lambda: solved().value,
        "rank": lambda: solved().rank,
        "nc1_trace": lambda: nc1_trace(stats),
        "nc1_pca": lambda: nc1_pca(stats),
        "nc2_equinorm": lambda: nc2_equinorm(centred_means(stats)),
        "nc2_equiangular": lambda: nc2_equiangular(centred_means(stats)),
        "nc2_maximal_angle": lambda: nc2_maximal_angle(centred_means(stats)),
        "nc2_etf": lambda: nc2_etf(centred_means(stats)),
        "nc2_equinorm_weight": lambda: nc2_equinorm(_weight(stats, weight())),
        "nc2_equiangular_weight": lambda: nc2_equiangular(_weight(stats, weight())),
        "nc2_maximal_angle_weight": lambda: nc2_maximal_angle(_weight(stats, weight())),
        "nc2_etf_weight": lambda: nc2_etf(_weight(stats, weight())),
        "nc3_papyan": lambda: nc3_papyan(stats, weight()),
        "nc3_zhu": lambda: nc3_zhu(stats, weight()),
        "nc3_bias": lambda: nc3_bias(stats, weight(), bias_C),
    }
    values, reasons = _sizes(stats), dict[str, str]()
    for name, metric in metrics.items():
        try:
            values[name] = metric()
        except Undefined as why:
            values[name], reasons[name] = None, str(why)
    values["reasons"] = reasons
    return values


def _sizes(stats: Statistics) -> Summary:
    counts = [int(n) for n in stats.n_K[present_classes(stats)]]
    sizes = {"d": stats.means_KD.shape[1], "K": len(counts), "K_empty": len(stats.n_K) - len(counts)}
    return {**sizes, "N": sum(counts), "n_min": min(counts, default=0), "n_max": max(counts, default=0)}


def _nc1(centred_KD: Tensor, n_K: Tensor, scatter_DD: Tensor) -> NC1:
    root_RD, rank = _inverse_root(centred_KD / len(n_K) ** 0.5, n_K)
    trace = ((root_RD @ scatter_DD) * root_RD).sum() / n_K.sum()
    return NC1(float(trace / len(n_K)), rank)


def _inverse_root(rows_KD: Tensor, n_K: Tensor) -> tuple[Tensor, int]:
    """Y with Y^T Y = Sigma_B^+, where Sigma_B = A^T A for rows A with sum_k n_k A_k = 0; and its rank.

    K <= D: G = A A^T + a q q^T, where q = n/|n| spans the null space of A A^T and a is its mean diagonal;
    then Sigma_B^+ = A^T G^{-2} A and Y = G^{-1} A. K > D: A^T A = L L^T and Y = L^{-1}. Never a plain pinv
    of a D x D matrix: its default cut-off deletes weak directions of the means, and those dominate NC1.
    """
    wide = len(rows_KD) <= rows_KD.shape[1]
    gram = rows_KD @ rows_KD.T if wide else rows_KD.T @ rows_KD
    null_K = n_K / n_K.norm()
    full = gram + gram.diagonal().mean() * null_K.outer(null_K) if wide else gram
    factor, failed = torch.linalg.cholesky_ex(full)
    if not failed:
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(full)).to(factor), upper=False)
        # tr(G) tr(G^-1) bounds the condition number: below this no eigenvalue is under the cut-off.
        if full.trace() * inverse.square().sum() < 1 / EIGENVALUE_CUTOFF:
            return (inverse.T @ (inverse @ rows_KD), len(full) - 1) if wide else (inverse, len(full))
    # Dependent class means: the same from the eigenvectors above the cut-off.
    values, vectors = torch.linalg.eigh(gram)
    kept = values > EIGENVALUE_CUTOFF * values[-1]
    values_R1, vectors_RX = values[kept, None], vectors[:, kept].T
    return (vectors_RX @ rows_KD / values_R1 if wide else vectors_RX / values_R1.sqrt()), len(values_R1)


def _not_coincident(centred_KD: Tensor, stats: Statistics) -> Tensor:
    if centred_KD.norm(dim=1).max() <= COINCIDENT * stats.means_KD.norm(dim=1).max():
        raise Undefined("all class means coincide")
    return centred_KD


def _rows(rows_KD: Tensor) -> Tensor:
    if len(rows_KD) < 2:
        raise Undefined("only one class has samples" if len(rows_KD) else "no samples")
    return rows_KD.detach().double()


def _cosines(rows_KD: Tensor) -> Tensor:
    """cos(r_i, r_j) of all pairs i < j: (K(K-1)/2,)."""
    norms_K = _rows(rows_KD).norm(dim=1)
    if not norms_K.all():
        raise Undefined("a row is zero and makes no angle")
    unit_KD = _rows(rows_KD) / norms_K[:, None]
    first, second = torch.triu_indices(len(unit_KD), len(unit_KD), offset=1, device=unit_KD.device)
    cosines_KK: Tensor = unit_KD @ unit_KD.T
    return cosines_KK[first, second]


def _distance_to_etf(gram_KK: Tensor) -> float:
    size = len(gram_KK)
    simplex_KK = (torch.eye(size).to(gram_KK) - 1 / size) / (size - 1) ** 0.5
    return float((_unit(gram_KK) - simplex_KK).norm())


def _unit(matrix: Tensor) -> Tensor:
    if not matrix.any():
        raise Undefined("the classifier, or its product with the class means, is zero")
    norm: Tensor = matrix.norm()
    return matrix / norm


def _weight(stats: Statistics, weight_CD: Tensor) -> Tensor:
    """Classifier rows of the non-empty classes: (K, D) fp64."""
    _expect("classifier weight", weight_CD, stats.means_KD.shape)
    return weight_CD.detach().double()[present_classes(stats)]


def _bias(stats: Statistics, bias_C: Tensor | None) -> Tensor:
    """Biases of the non-empty classes, zeros without a bias: (K,) fp64."""
    bias_C = torch.zeros_like(stats.n_K) if bias_C is None else bias_C
    _expect("classifier bias", bias_C, stats.n_K.shape)
    return bias_C.detach().double()[present_classes(stats)]


def _features(feats_BD: Tensor, stats: Statistics) -> Tensor:
    _expect("features", feats_BD, (len(feats_BD), stats.means_KD.shape[1]))
    return feats_BD.detach().double()


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or not tensor.isfinite().all():
        raise ValueError(f"{name} {tuple(tensor.shape)}: expected finite values, of shape {tuple(shape)}")
