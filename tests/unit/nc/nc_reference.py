"""Labelled features for the tests of `nc`, and what they give by the definitions: two passes, fp64, nothing of `nc`.

Letters: B samples, K classes, P non-empty classes, D dimensions.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from nc_dist.nc import ClassMoments, Statistics


def randn(seed: int, *shape: int) -> Tensor:
    """fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def class_means(num_classes: int, dim: int, seed: int = 0, norm: float = 20.0) -> Tensor:
    """Of one norm, in random directions, fp64."""
    return norm * torch.nn.functional.normalize(randn(seed, num_classes, dim))


def clusters(
    num_classes: int, dim: int, per_class: int, sigma: float, seed: int = 0, norm: float = 20.0
) -> tuple[Tensor, Tensor]:
    """fp64 features of isotropic noise about random class means, classes interleaved."""
    labels_B = torch.arange(num_classes).repeat(per_class)
    noise_BD = randn(seed + 1, len(labels_B), dim)
    return class_means(num_classes, dim, seed, norm)[labels_B] + sigma * noise_BD, labels_B


def scattered(seed: int, num: int, num_classes: int, dim: int, sigma: float = 1.0) -> tuple[Tensor, Tensor]:
    """fp64 features of random classes, of which some may lack samples."""
    labels_B = torch.randint(num_classes, (num,), generator=torch.Generator().manual_seed(seed))
    return class_means(num_classes, dim, seed)[labels_B] + sigma * randn(seed + 1, num, dim), labels_B


def simplex(num_classes: int, dim: int, seed: int = 0) -> Tensor:
    """K unit vectors of an equiangular tight frame, turned into D dimensions."""
    frame_KK = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    rotation_DK = torch.linalg.qr(randn(seed, dim, num_classes)).Q
    return frame_KK @ rotation_DK.T * math.sqrt(num_classes / (num_classes - 1))


def two_pass(feats_BD: Tensor, labels_B: Tensor, num_classes: int) -> Statistics:
    """The definitions, of these very features."""
    exact_BD = feats_BD.detach().double()
    n_K = torch.bincount(labels_B, minlength=num_classes).double()
    means = [
        exact_BD[labels_B == k].mean(0) if n_K[k] else exact_BD.new_zeros(exact_BD.shape[1]) for k in range(num_classes)
    ]
    means_KD = torch.stack(means)
    residuals_BD = exact_BD - means_KD[labels_B]
    within_K = torch.stack([residuals_BD[labels_B == k].square().sum() for k in range(num_classes)])
    ulps_BD = torch.exp2(exact_BD.frexp().exponent.double() - 1) * torch.finfo(feats_BD.dtype).eps * (exact_BD != 0)
    return Statistics(n_K, means_KD, residuals_BD.T @ residuals_BD, within_K, (ulps_BD**2).sum(0) / 12)


def nc1_by_svd(stats: Statistics, cutoff: float = 1e-10) -> float:
    """(1/K) tr(Sigma_W Sigma_B^+) by a thin SVD of the centred class means."""
    present_P = stats.n_K > 0
    classes, total = int(present_P.sum()), stats.n_K.sum()
    centred_PD = (stats.means_KD - stats.n_K @ stats.means_KD / total)[present_P] / classes**0.5
    _, singular_R, right_RD = torch.linalg.svd(centred_PD, full_matrices=False)
    kept = singular_R > cutoff * singular_R[0]
    whitened_RD = right_RD[kept] / singular_R[kept, None]
    return float((whitened_RD @ stats.scatter_DD * whitened_RD).sum() / total / classes)


def accumulated(
    feats_BD: Tensor, labels_B: Tensor, num_classes: int, batch: int = 256, **options: object
) -> ClassMoments:
    moments = ClassMoments(num_classes, feats_BD.shape[1], **options)  # type: ignore[arg-type]
    for feats, labels in zip(feats_BD.split(batch), labels_B.split(batch), strict=True):
        moments.update(feats, labels)
    return moments


def exact(feats_BD: Tensor, labels_B: Tensor, num_classes: int, batch: int = 256) -> Statistics:
    """Statistics with products in fp64."""
    return accumulated(feats_BD, labels_B, num_classes, batch, dtype=torch.float64).statistics()


def all_reduced(parts: list[ClassMoments]) -> list[ClassMoments]:
    """One thread a rank; a barrier-based sum in rank order, so that every rank must make the same calls."""
    barrier, slots = threading.Barrier(len(parts), timeout=30), [torch.empty(0)] * len(parts)

    def reduce(rank: int) -> ClassMoments:
        def sum_fn(tensor: Tensor) -> Tensor:
            slots[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(torch.stack(slots).sum(0))
            barrier.wait()  # nobody overwrites a slot that another still reads
            return tensor

        try:
            return parts[rank].all_reduce(sum_fn)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(reduce, range(len(parts))))


def assert_same(found: Statistics, expected: Statistics, tolerance: float) -> None:
    """Counts equal, all else to this relative error of its norm."""
    assert torch.equal(found.n_K, expected.n_K)
    for name in ("means_KD", "scatter_DD", "within_K", "quantum_D"):
        error = (getattr(found, name) - getattr(expected, name)).norm()
        assert error <= tolerance * getattr(expected, name).norm(), (name, float(error))


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Of two state dicts, or the fields of two Statistics."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def fields(stats: Statistics) -> dict[str, Tensor]:
    """Without what was derived of them."""
    return {name: getattr(stats, name) for name in ("n_K", "means_KD", "scatter_DD", "within_K", "quantum_D")}
