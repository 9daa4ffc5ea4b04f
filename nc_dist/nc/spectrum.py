"""Numerical and stable rank of the features of each class, from exact Gram spectra; classes are spread over ranks.

The features move, not covariances: class k goes to rank k mod P, which has all of its n samples and solves n x n.
Both ranks depend on n, so n is the same for every class and stands beside them; to save time, take fewer classes.

Letters: N samples on this rank, n samples of one class, D feature dimensions, K classes, M classes that have samples,
C classes solved together, A metrics; P is the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nc_dist.nc.statistics import Undefined

Exchange = Callable[[list[Tensor]], list[Tensor]]  # one tensor for each rank -> one tensor from each rank
SumFn = Callable[[Tensor], Tensor]
Ranks = dict[str, float | int | None | dict[str, str]]

UNCENTRED = ("numerical_rank", "stable_rank")
METRICS = (*UNCENTRED, "numerical_rank_centred", "stable_rank_centred", "numerical_rank_share")
CHUNK_BYTES = 2**28  # that classes solved together take, unless one alone takes more


@torch.no_grad()
def class_spectrum(feats_nD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values of one class's features H, uncentred and centred at the class mean m: fp64, ascending.

    There are min(n, D) of each. With R = H - 1 m^T,
    H H^T = R R^T + (R m) 1^T + 1 (R m)^T + |m|^2 1 1^T, and H^T H = R^T R + n m m^T where n > D.
    All in fp64: fp32 products save a fifth of the time, and cost 2 % for a class that lies in a few directions.
    Raises Undefined without samples.
    """
    if not len(feats_nD):
        raise Undefined("no samples")
    uncentred, centred = _spectra(feats_nD[None])
    return uncentred[0], centred[0]


def numerical_rank(eigenvalues: Tensor) -> float:
    """|H|_*^2 / |H|_F^2 = (sum_i sqrt(l_i))^2 / sum_i l_i, from 1 to min(n, D) (Li et al. 2022, arXiv 2212.12206).

    `eigenvalues` l as `class_spectrum` gives them; Undefined where all are zero.
    """
    return _defined(_ranks(eigenvalues)[0])


def stable_rank(eigenvalues: Tensor) -> float:
    """|H|_F^2 / |H|_2^2 = sum_i l_i / max_i l_i, from 1 to min(n, D); Undefined where all are zero."""
    return _defined(_ranks(eigenvalues)[1])


@torch.no_grad()
def by_class(
    feats_ND: Tensor, labels_N: Tensor, num_classes: int, exchange: Exchange, rank: int, size: int
) -> dict[int, Tensor]:
    """All samples of the classes k with k mod `size` = `rank`, by class: (n, D), (0, D) for a class without any.

    Rows come in rank order and, of one rank, as they were given; they keep their dtype. Every rank must call it, also
    one with (0, D) features. Raises ValueError for shapes and types that do not fit, labels outside 0..K-1, NaN, Inf.
    """
    _check(feats_ND, labels_N, num_classes)
    owners_N = labels_N % size
    feats = exchange([feats_ND[owners_N == r] for r in range(size)])
    labels = exchange([labels_N[owners_N == r].long() for r in range(size)])
    return {
        k: torch.cat([rows_ND[own_N == k] for rows_ND, own_N in zip(feats, labels, strict=True)])
        for k in range(rank, num_classes, size)
    }


def class_ranks(
    feats_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    per_class: int,
    *,
    exchange: Exchange = lambda parts: parts,
    sum_fn: SumFn = lambda tensor: tensor,
    rank: int = 0,
    size: int = 1,
) -> Ranks:
    """Means over classes of `numerical_rank` and `stable_rank`, uncentred and centred; ready for JSON.

    The features are the chosen subset: over all ranks `per_class` samples of each class, or none: such a class is
    left out. `exchange` sends its i-th tensor to rank i and returns what each rank sent here; `sum_fn` returns the
    sum over ranks of one fp64 tensor. Every rank must call it; all get the same bits.

    `rank_n` is per_class, `rank_classes` and `rank_classes_absent` count classes, `numerical_rank_share` is
    numerical_rank_centred / min(n, D). What has no value in some class is None: `reasons` says why. Raises
    ValueError as `by_class` does, and on every rank for a class with another number of samples.
    """
    feats_K = by_class(feats_ND, labels_N, num_classes, exchange, rank, size)
    found_K = torch.zeros(num_classes, dtype=torch.float64)
    found_K[rank::size] = torch.tensor([len(feats_nD) for feats_nD in feats_K.values()], dtype=torch.float64)
    present_M = _present(sum_fn(found_K.to(feats_ND.device)).cpu(), per_class)
    values_KA = torch.zeros(num_classes, len(METRICS), dtype=torch.float64)
    mine = [k for k, feats_nD in feats_K.items() if len(feats_nD)]
    step = _classes_at_once(per_class, feats_ND.shape[1])
    for chosen in (mine[start : start + step] for start in range(0, len(mine), step)):
        values_KA[chosen] = _values(torch.stack([feats_K[k] for k in chosen])).cpu()
    # One rank's row and zeros of the others: the sum is exact, whatever its order and however many the ranks.
    values_MA = sum_fn(values_KA.to(feats_ND.device)).cpu()[present_M]
    means, reasons = _means(values_MA, present_M, per_class)
    counts = {"rank_classes": len(present_M), "rank_classes_absent": num_classes - len(present_M)}
    return {"rank_n": per_class, **counts, **means, "reasons": reasons}


def _spectra(feats_CnD: Tensor) -> tuple[Tensor, Tensor]:
    """`class_spectrum` of several classes at once: both (C, min(n, D)) fp64."""
    n, dim = feats_CnD.shape[1:]
    pilots_C1D = feats_CnD[:, :1].double()
    shifted_CnD = feats_CnD.double() - pilots_C1D  # equal samples leave exact zeros
    offsets_C1D = shifted_CnD.mean(1, keepdim=True)
    residuals_CnD, means_C1D = shifted_CnD - offsets_C1D, pilots_C1D + offsets_C1D
    if n > dim:
        centred = residuals_CnD.mT @ residuals_CnD
        uncentred = centred + n * means_C1D.mT * means_C1D
    else:
        centred = residuals_CnD @ residuals_CnD.mT
        cross_Cn1 = residuals_CnD @ means_C1D.mT
        uncentred = centred + cross_Cn1 + cross_Cn1.mT + means_C1D @ means_C1D.mT
    eigenvalues, eigenvalues_centred = (torch.linalg.eigvalsh(grams).clamp(min=0) for grams in (uncentred, centred))
    if n <= dim:
        eigenvalues_centred[:, 0] = 0  # exactly, as 1^T R = 0: the square root of its rounding would count
    return eigenvalues, eigenvalues_centred


def _ranks(eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
    """Numerical and stable rank over the last axis; 0, which no rank can be, where all eigenvalues are zero."""
    largest = eigenvalues.amax(-1, keepdim=True)
    shares = eigenvalues / largest.where(largest > 0, 1)
    stable = shares.sum(-1)
    return shares.sqrt().sum(-1).square() / stable.clamp(min=1), stable


def _defined(rank: Tensor) -> float:
    if not rank:
        raise Undefined("all eigenvalues are zero")
    return float(rank)


def _values(feats_CnD: Tensor) -> Tensor:
    """METRICS of several classes: (C, A) fp64; 0, which no rank can be, for what has no value."""
    uncentred, centred = (_ranks(eigenvalues) for eigenvalues in _spectra(feats_CnD))
    return torch.stack([*uncentred, *centred, centred[0] / min(feats_CnD.shape[1:])], 1)


def _classes_at_once(n: int, dim: int) -> int:
    """How many classes fit CHUNK_BYTES: at most four copies of the features and of the Gram matrices, in fp64."""
    return max(1, CHUNK_BYTES // (4 * 8 * max(1, n * dim + min(n, dim) ** 2)))


def _means(values_MA: Tensor, present_M: Tensor, n: int) -> tuple[dict[str, float | None], dict[str, str]]:
    """Means over classes of each of METRICS, None where a class has no value; and why."""
    means, reasons = dict[str, float | None](), dict[str, str]()
    for name, values_M in zip(METRICS, values_MA.T, strict=True):
        missing = present_M[values_M == 0]
        means[name] = None
        if not len(present_M):
            reasons[name] = "no samples"
        elif len(missing):
            what = "features" if name in UNCENTRED else "features less their mean"
            where = f"{len(missing)} of {len(present_M)} classes, the first is class {int(missing[0])}"
            reasons[name] = f"all {what} are zero (n = {n}) in {where}"
        else:
            means[name] = float(values_M.mean())
    return means, reasons


def _present(found_K: Tensor, per_class: int) -> Tensor:
    wrong = ((found_K > 0) & (found_K != per_class)).nonzero().flatten().tolist()
    if per_class < 1 or wrong:
        found = "".join(f": class {k} has {int(found_K[k])} samples over all ranks" for k in wrong[:1])
        raise ValueError(f"per_class={per_class}{found}: the ranks of classes compare at one n, at least 1")
    return found_K.nonzero().flatten()


def _check(feats_ND: Tensor, labels_N: Tensor, num_classes: int) -> None:
    if feats_ND.ndim != 2 or not feats_ND.is_floating_point() or not feats_ND.isfinite().all():
        found = f"{tuple(feats_ND.shape)} {feats_ND.dtype}"
        raise ValueError(f"features {found}: expected finite floating-point numbers of shape (N, D)")
    if labels_N.shape != feats_ND.shape[:1] or labels_N.is_floating_point():
        raise ValueError(f"labels {tuple(labels_N.shape)} {labels_N.dtype}: expected {len(feats_ND)} integers")
    if len(labels_N) and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < num_classes:
        raise ValueError(f"labels {int(labels_N.min())}..{int(labels_N.max())}: expected 0..{num_classes - 1}")
