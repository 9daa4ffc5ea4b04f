"""NC2 and NC3, the geometry of class means and classifier: pure functions, all fp64.

NC2 is of rows: `centred_means(moments)`, or a classifier's weight. NC3 is of both.

Letters: C all classes, P non-empty classes, D feature dimensions, K rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nc_dist.nc.statistics import Moments, Statistics, Undefined, centred_means


def nc2_equinorm(rows_KD: Tensor) -> float:
    """std_k |r_k| / mean_k |r_k| (Papyan et al. 2020, NC2).

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


def nc3_papyan(moments: Moments, weight_CD: Tensor) -> float:
    """Self-duality | W/|W|_F - M/|M|_F |_F, M = `centred_means`, non-empty classes (Papyan et al. 2020)."""
    stats = moments.statistics()
    return float((_unit(present_weight(stats, weight_CD)) - _unit(centred_means(stats))).norm())


def nc3_zhu(moments: Moments, weight_CD: Tensor) -> float:
    """Self-duality | G/|G|_F - (K-1)^{-1/2} (I - 11^T/K) |_F, G = W M^T, non-empty classes (Zhu et al. 2021)."""
    stats = moments.statistics()
    return _distance_to_etf(present_weight(stats, weight_CD) @ centred_means(stats).T)


def nc3_bias(moments: Moments, weight_CD: Tensor, bias_C: Tensor | None = None) -> float:
    """|W mu_G + b|_2 over non-empty classes, in logits (Zhu et al. 2021); without a bias b = 0."""
    stats = moments.statistics()
    return float((present_weight(stats, weight_CD) @ stats.global_mean_D + present_bias(stats, bias_C)).norm())


def present_weight(stats: Statistics, weight_CD: Tensor) -> Tensor:
    """Classifier rows of the non-empty classes: (P, D) fp64; ValueError for another number of classes or dimensions."""
    expect("classifier weight", weight_CD, tuple(stats.means_KD.shape))
    return weight_CD.detach().double()[stats.present_P]


def present_bias(stats: Statistics, bias_C: Tensor | None) -> Tensor:
    """Biases of the non-empty classes, zeros without a bias: (P,) fp64."""
    bias_C = torch.zeros_like(stats.n_K) if bias_C is None else bias_C
    expect("classifier bias", bias_C, tuple(stats.n_K.shape))
    return bias_C.detach().double()[stats.present_P]


def expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor has this shape and finite values."""
    if tensor.shape != shape or not tensor.isfinite().all():
        raise ValueError(f"{name} {tuple(tensor.shape)}: expected finite values, of shape {shape}")


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
