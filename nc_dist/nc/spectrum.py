"""Numerical and stable rank of the features of each class, from exact Gram spectra; classes are spread over ranks.

The features move, not covariances: class k goes to rank k mod P, which has all of its n samples and solves n x n.
Both ranks depend on n, so n is the same for every class and stands beside them; to save time, take fewer classes.

Letters: N samples on this rank, n samples of one class, D feature dimensions, K classes, M classes that have samples,
A and B any sizes; P is the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nc_dist.nc.statistics import Undefined

Exchange = Callable[[list[Tensor]], list[Tensor]]  # one tensor for each rank -> one tensor from each rank
SumFn = Callable[[Tensor], Tensor]
Ranks = dict[str, float | int | None | dict[str, str]]

UNCENTRED = ("numerical_rank", "stable_rank")
METRICS = (*UNCENTRED, "numerical_rank_centred", "stable_rank_centred", "numerical_rank_share")


class Bytes(NamedTuple):
    """What one rank sends to the others, and what it holds at once beside the features it was given."""

    sent: int
    held: int


@torch.no_grad()
def class_spectrum(feats_nD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values of one class's features H, uncentred and centred at the class mean m: fp64, ascending.

    There are min(n, D) of each. With R = H - 1 m^T,
    H H^T = R R^T + (R m) 1^T + 1 (R m)^T + |m|^2 1 1^T, and H^T H = R^T R + n m m^T where n > D.
    All in fp64: fp32 products save a fifth of the time, and cost 2 % for a class that lies in a few directions.
    Raises Undefined without samples.
    """
    n, dim = feats_nD.shape
    if n == 0:
        raise Undefined("no samples")
    pilot_D = feats_nD[0].double()
    shifted_nD = feats_nD.double() - pilot_D  # equal samples leave exact zeros
    offset_D = shifted_nD.mean(0)
    residuals_nD, mean_D = shifted_nD - offset_D, pilot_D + offset_D
    if n > dim:
        centred = residuals_nD.T @ residuals_nD
        uncentred = centred + n * mean_D.outer(mean_D)
    else:
        centred = residuals_nD @ residuals_nD.T
        cross_n = residuals_nD @ mean_D
        uncentred = centred + cross_n[:, None] + cross_n + mean_D @ mean_D
    uncentred_n, centred_n = (torch.linalg.eigvalsh(gram).clamp(min=0) for gram in (uncentred, centred))
    if n <= dim:
        centred_n[0] = 0  # exactly, as 1^T R = 0: the square root of its rounding would count
    return uncentred_n, centred_n


def numerical_rank(eigenvalues: Tensor) -> float:
    """|H|_*^2 / |H|_F^2 = (sum_i sqrt(l_i))^2 / sum_i l_i, from 1 to min(n, D) (Li et al. 2022, arXiv 2212.12206).

    `eigenvalues` l as `class_spectrum` gives them; Undefined where all are zero.
    """
    shares = _of_largest(eigenvalues)
    return float(shares.sqrt().sum().square() / shares.sum())


def stable_rank(eigenvalues: Tensor) -> float:
    """|H|_F^2 / |H|_2^2 = sum_i l_i / max_i l_i, from 1 to min(n, D); Undefined where all are zero."""
    return float(_of_largest(eigenvalues).sum())


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
    for k, feats_nD in feats_K.items():
        if len(feats_nD):
            values_KA[k] = _values(feats_nD)
    # One rank's row and zeros of the others: the sum is exact, whatever its order and however many the ranks.
    values_MA = sum_fn(values_KA.to(feats_ND.device)).cpu()[present_M]
    means, reasons = _means(values_MA, present_M, per_class)
    counts = {"rank_classes": len(present_M), "rank_classes_absent": num_classes - len(present_M)}
    return {"rank_n": per_class, **counts, **means, "reasons": reasons}


def exchange_bytes(num_classes: int, per_class: int, dim: int, itemsize: int, size: int) -> Bytes:
    """What `by_class` costs each of `size` ranks at most, where they hold equal shares of all samples, in bytes.

    `itemsize` bytes are one feature. Held at once are three copies of a share: split by destination, joined to be
    sent, received; in one process two: as split, and by class.
    """
    share = -(-num_classes // size) * per_class * (dim * itemsize + 8)  # 8 for the label
    return Bytes(sent=share * (size - 1) // size, held=share * (3 if size > 1 else 2))


def _of_largest(eigenvalues: Tensor) -> Tensor:
    if not eigenvalues.any():
        raise Undefined("all eigenvalues are zero")
    return eigenvalues / eigenvalues.max()


def _values(feats_nD: Tensor) -> Tensor:
    """METRICS of one class: (A,) fp64; 0, which no rank can be, for what has no value."""
    values = list[float]()
    for eigenvalues in class_spectrum(feats_nD):
        values += [numerical_rank(eigenvalues), stable_rank(eigenvalues)] if eigenvalues.any() else [0.0, 0.0]
    return torch.tensor([*values, values[2] / min(feats_nD.shape)], dtype=torch.float64)


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
