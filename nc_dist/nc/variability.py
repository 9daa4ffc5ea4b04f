"""NC1, within-class variability, and what it must be read with: pure functions of `Moments`, all fp64.

`nc1` follows Papyan, Han & Donoho 2020 (arXiv 2008.08186) and the code of Zhu et al. 2021 (arXiv 2105.02375):
(1/K) tr(Sigma_W Sigma_B^+) with pooled Sigma_W = S/N, unweighted Sigma_B = (1/K) sum_k (mu_k - mu_G)(mu_k - mu_G)^T,
mu_G the mean of all samples, K the number of non-empty classes, no correction for degrees of freedom. Each other
convention has a name of its own. 0 is collapsed.

Letters: P non-empty classes, D feature dimensions, R rank of Sigma_B, N samples.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from nc_dist.nc import inverse_root
from nc_dist.nc.statistics import Moments, Statistics, Undefined, centred_means

NULL_DRAWS = 5
FLOOR_FACTOR = 3  # nc1 below this many times its quantisation floor measures rounding
GAP_LIMIT = 0.05  # halves of the samples that differ by more: n is too small


def nc1(moments: Moments) -> float:
    """(1/K) tr(Sigma_W Sigma_B^+) (Papyan et al. 2020, NC1)."""
    stats = moments.statistics()
    return _trace(stats) / len(stats.present_P)


def rank(moments: Moments) -> int:
    """Rank of Sigma_B that the pseudo-inverse in `nc1` uses: min(K-1, D) unless the means are dependent."""
    return moments.statistics().root[1]


def nc1_dof(moments: Moments) -> float:
    """NC1 with the unbiased Sigma_W = S/(N - K)."""
    stats = moments.statistics()
    free = stats.num_samples - len(stats.present_P)
    if free < 1:
        raise Undefined("one sample a class: N - K = 0")
    return nc1(stats) * stats.num_samples / free


def nc1_rank(moments: Moments) -> float:
    """tr(Sigma_W Sigma_B^+) divided by the rank of Sigma_B instead of K."""
    stats = moments.statistics()
    return _trace(stats) / rank(stats)


def nc1_weighted(moments: Moments) -> float:
    """NC1 with Sigma_B = sum_k (n_k/N)(mu_k - mu_G)(mu_k - mu_G)^T, the convention of LDA."""
    stats = moments.statistics()
    stats.expect_within()
    counts_P, total = stats.counts_P, stats.num_samples
    if len(counts_P) <= stats.dim:
        rows_PD = centred_means(stats) * (counts_P / total).sqrt()[:, None]
        root_RD, _ = inverse_root.of_rows(rows_PD, counts_P.sqrt())
    else:
        root_RD, _ = inverse_root.of_matrix(stats.weighted_between_DD / total)
    return _quadratic(root_RD, stats.scatter_DD) / total / len(counts_P)


def nc1_balanced(moments: Moments) -> float:
    """NC1 with every class alike: Sigma_W = (1/K) sum_k S_k/n_k, mu_G the mean of the class means.

    From moments for classes of one size, where it equals `nc1`; otherwise it takes the second pass.
    """
    stats = moments.statistics()
    if not (stats.counts_P == stats.counts_P[:1]).all():
        raise Undefined("classes differ in size: it takes the second pass")
    return nc1(stats)


def nc1_trace(moments: Moments) -> float:
    """tr Sigma_W / tr Sigma_B (Tirer et al. 2023, the quotient form of NC1)."""
    stats = moments.statistics()
    stats.expect_within()
    between = sum(float(rows_CD.square().sum()) for _, rows_CD in stats.centred_chunks()) / len(stats.present_P)
    return float(stats.within_K.sum()) / stats.num_samples / between


def nc1_pca(moments: Moments) -> float:
    """NC1 within the top d0 = 2K principal directions of all samples: comparable over layers and models.

    They are eigenvectors of the total scatter. Undefined when D < d0. Takes O(D^3).
    """
    stats = moments.statistics()
    kept = 2 * len(stats.present_P)
    if stats.dim < kept:
        raise Undefined(f"not comparable: d = {stats.dim} is less than d0 = 2K = {kept}")
    basis_DE = stats.total_eigen[1][:, -kept:]
    projected = Statistics(
        n_K=stats.n_K,
        means_KD=stats.means_KD @ basis_DE,
        scatter_DD=basis_DE.T @ stats.scatter_DD @ basis_DE,
        within_K=stats.within_K,
        quantum_D=stats.quantum_D[:kept],
    )
    return nc1(projected)


def nc1_null(moments: Moments, draws: int = NULL_DRAWS) -> float:
    """Median NC1 of the same features under permuted labels: what they would give if they knew nothing of the classes.

    Permuting labels turns the N - 1 contrasts of the samples: with X - mu_G = U s V^T, the rows sqrt(n_k) (mu_k - mu_G)
    become random orthonormal contrasts times U s V^T. Drawn as if U could be any orthonormal basis, of which nothing
    but s and V needs to be known: S_T of moments that were merged or read from a file. Seeded: a function of these.
    """
    stats = moments.statistics()
    counts_P, total = stats.counts_P, stats.num_samples
    values_D, _ = stats.total_eigen  # in the eigenvectors' coordinates S_T is diagonal
    values_D = values_D[-min(total - 1, len(values_D)) :]  # the others are rounding
    values_D = values_D[values_D > inverse_root.EIGENVALUE_CUTOFF * values_D[-1]]
    if not len(values_D):
        raise Undefined("all samples coincide")
    stats.expect_within()
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        weighted_PD = _contrasts((counts_P / total).sqrt(), len(values_D), total - 1, generator) * values_D.sqrt()
        scatter_DD = values_D.diag() - weighted_PD.T @ weighted_PD
        found.append(nc1(Statistics(counts_P, weighted_PD / counts_P.sqrt()[:, None], scatter_DD, counts_P, values_D)))
    return statistics.median(found)  # near K = D the draws have a heavy tail


def _contrasts(null_P: Tensor, kept: int, size: int, generator: torch.Generator) -> Tensor:
    """The first `kept` of `size` coordinates of random orthonormal rows, less their part along `null_P`: (P, kept)."""
    rows_PD = _corner(len(null_P), kept, size, generator).to(null_P.device)
    return rows_PD - null_P[:, None] * (null_P @ rows_PD)


def _corner(rows: int, columns: int, size: int, generator: torch.Generator) -> Tensor:
    """The upper left block of a random orthogonal matrix of `size`: (rows, columns). Takes O(rows columns min).

    Rows [A, B] of normal numbers, made orthonormal, are L^-1 [A, B] with L L^T = A A^T + B B^T; B B^T is drawn as a
    whole, by Bartlett's decomposition of a Wishart matrix. The transposed block has the same law.
    """
    if rows > columns:
        return _corner(columns, rows, size, generator).T
    rest = size - columns
    normal_RC = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    others_RR = torch.randn(rows, min(rest, rows), generator=generator, dtype=torch.float64)
    if rest > rows:
        degrees_R = rest - torch.arange(rows, dtype=torch.float64)
        chi_R = 2 * torch._standard_gamma(degrees_R / 2, generator=generator)
        others_RR = others_RR.tril(-1) + chi_R.sqrt().diag()
    factor_RR: Tensor = torch.linalg.cholesky(normal_RC @ normal_RC.T + others_RR @ others_RR.T)
    block_RC: Tensor = torch.linalg.solve_triangular(factor_RR, normal_RC, upper=False)
    return block_RC


def nc1_floor(moments: Moments) -> float:
    """NC1 that rounding to the features' type makes by itself: `nc1` with S := diag(quantum)."""
    stats = moments.statistics()
    root_RD, _ = stats.root
    return float((root_RD.square() @ stats.quantum_D).sum()) / stats.num_samples / len(stats.present_P)


def nc1_about(moments: Moments, reference: Moments) -> float:
    """NC1 of samples about the class means of others, with their Sigma_B: held-out samples about the training means."""
    stats, other = moments.statistics(), reference.statistics()
    if stats.means_KD.shape != other.means_KD.shape:
        found = f"(K, d) = {tuple(stats.means_KD.shape)} and {tuple(other.means_KD.shape)}"
        raise ValueError(f"{found}: both must be of the same classes and dimensions")
    if not other.n_K[stats.present_P].all():
        raise Undefined("a class has no samples among those whose means are used")
    shifts_PD = (stats.means_KD - other.means_KD)[stats.present_P] * stats.counts_P.sqrt()[:, None]
    about_DD = stats.scatter_DD + shifts_PD.T @ shifts_PD
    return _quadratic(other.root[0], about_DD) / stats.num_samples / len(other.present_P)


def nc1_split_half(moments: Moments) -> float:
    """|NC1 of halves - NC1 of all| / NC1 of all, with `nc1_dof`: above GAP_LIMIT, n is too small for NC1."""
    stats = moments.statistics()
    if stats.halves is None:
        raise Undefined("the samples were not kept in two halves")
    every = nc1_dof(stats)
    if not every:
        raise Undefined("NC1 is zero")
    return abs(sum(map(nc1_dof, stats.halves)) / 2 - every) / every


def _trace(stats: Statistics) -> float:
    """tr(Sigma_W Sigma_B^+)."""
    stats.expect_within()
    return _quadratic(stats.root[0], stats.scatter_DD) / stats.num_samples


def _quadratic(root_RD: Tensor, scatter_DD: Tensor) -> float:
    """tr(Y S Y^T)."""
    return float(((root_RD @ scatter_DD) * root_RD).sum())
