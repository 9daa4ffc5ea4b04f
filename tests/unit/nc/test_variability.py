"""NC1 and its conventions against plain fp64 formulas on the features, and closed forms.

Letters: B samples, K classes, D dimensions.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from nc_reference import accumulated, class_means, clusters, exact, nc1_by_svd, randn, two_pass
from torch import Tensor

from nc_dist.nc import Statistics, Undefined
from nc_dist.nc.variability import (
    nc1,
    nc1_about,
    nc1_balanced,
    nc1_dof,
    nc1_pca,
    nc1_rank,
    nc1_trace,
    nc1_weighted,
    rank,
)

SIGMAS = [1, 1e-1, 1e-2, 1e-3, 1e-4]
SMALL = [(10, 64, 100), (100, 64, 20), (10, 512, 60), (100, 512, 20)]
GRID = [(10, 512, 200), (100, 512, 20), (1000, 512, 3), (10, 2048, 200), (100, 2048, 20), (1000, 2048, 2)]


def uneven(num_classes: int, dim: int) -> tuple[Tensor, Tensor]:
    """Class sizes 1, 2, ..., far from the origin."""
    labels_B = torch.repeat_interleave(torch.arange(num_classes), torch.arange(1, num_classes + 1))
    return randn(1, num_classes, dim)[labels_B] * 3 + randn(2, len(labels_B), dim) + 50, labels_B


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(
    ("num_classes", "dim", "per_class"), [*SMALL, *(pytest.param(*case, marks=pytest.mark.slow) for case in GRID)]
)
def test_nc1_is_accurate_however_collapsed(num_classes: int, dim: int, per_class: int, sigma: float) -> None:
    feats_BD, labels_B = clusters(num_classes, dim, per_class, sigma)
    feats_BD = feats_BD.float()
    found = accumulated(feats_BD, labels_B, num_classes).statistics()
    assert nc1(found) == pytest.approx(nc1_by_svd(two_pass(feats_BD, labels_B, num_classes)), rel=1e-6)
    assert rank(found) == min(num_classes - 1, dim)


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 5), (2, 1), (3, 2), (8, 8), (9, 8), (30, 8)])
def test_each_convention_of_uneven_classes_in_fp64(num_classes: int, dim: int) -> None:
    """K = 2, K - 1 < D, K - 1 = D, K > D; one class number without samples."""
    feats_BD, labels_B = uneven(num_classes, dim)
    expected = two_pass(feats_BD, labels_B, num_classes)
    samples, dims = len(labels_B), min(num_classes - 1, dim)
    centred_KD = expected.means_KD - feats_BD.mean(0)
    weighted = torch.linalg.pinv(centred_KD.T * expected.n_K / samples @ centred_KD, rtol=1e-10, hermitian=True)
    value = nc1_by_svd(expected)

    found = exact(feats_BD, labels_B + 1, num_classes + 1)
    assert nc1(found) == pytest.approx(value, rel=1e-9)
    assert rank(found) == dims
    assert nc1_dof(found) == pytest.approx(value * samples / (samples - num_classes), rel=1e-9)
    assert nc1_rank(found) == pytest.approx(value * num_classes / dims, rel=1e-9)
    assert nc1_weighted(found) == pytest.approx(
        float((weighted * expected.scatter_DD).sum() / samples / num_classes), rel=1e-9
    )
    between = centred_KD.square().sum() / num_classes
    assert nc1_trace(found) == pytest.approx(float(expected.within_K.sum() / samples / between), rel=1e-9)
    with pytest.raises(Undefined, match="differ in size"):
        nc1_balanced(found)


def test_balanced_nc1_is_nc1_for_classes_of_one_size() -> None:
    stats = exact(*clusters(6, 16, 30, 1.0), 7)
    assert nc1_balanced(stats) == nc1(stats)


def test_nc1_of_means_about_others_is_that_of_samples_whose_deviations_are_from_them() -> None:
    """Held-out samples: their scatter about the training means, over the training means' covariance."""
    feats_BD, labels_B = clusters(6, 16, 30, 1.0)
    held_BD, held_B = uneven(6, 16)
    train = two_pass(feats_BD, labels_B, 6)
    residuals_BD = held_BD - train.means_KD[held_B]
    centred_KD = train.means_KD - feats_BD.mean(0)
    inverse = torch.linalg.pinv(centred_KD.T @ centred_KD / 6, rtol=1e-10, hermitian=True)
    expected = float((inverse * (residuals_BD.T @ residuals_BD)).sum() / len(held_B) / 6)
    found = nc1_about(exact(held_BD, held_B, 6), exact(feats_BD, labels_B, 6))
    assert found == pytest.approx(expected, rel=1e-9)
    stats = exact(feats_BD, labels_B, 6)
    assert nc1_about(stats, stats) == pytest.approx(nc1(stats), rel=1e-12)
    with pytest.raises(Undefined, match="no samples among those"):
        nc1_about(stats, exact(feats_BD[labels_B > 0], labels_B[labels_B > 0], 6))
    with pytest.raises(ValueError, match=r"\(6, 16\) and \(6, 15\)"):
        nc1_about(stats, exact(feats_BD[:, 1:], labels_B, 6))


def test_pca_is_nc1_in_the_leading_directions_of_all_samples() -> None:
    feats_BD, labels_B = clusters(4, 40, 50, 2.0)
    right_DD = torch.linalg.svd(feats_BD - feats_BD.mean(0), full_matrices=False).Vh
    stats = exact(feats_BD, labels_B, 4)
    assert nc1_pca(stats) == pytest.approx(nc1_by_svd(two_pass(feats_BD @ right_DD[:8].T, labels_B, 4)), rel=1e-9)
    narrow = exact(feats_BD[:, :8], labels_B, 4)
    assert nc1_pca(narrow) == pytest.approx(nc1(narrow), rel=1e-9)
    with pytest.raises(Undefined, match="d = 7 is less than d0 = 2K = 8"):
        nc1_pca(exact(feats_BD[:, :7], labels_B, 4))


@pytest.mark.parametrize("coincident", [False, True])
def test_weak_directions_of_the_means_count_in_full(coincident: bool) -> None:
    """Power-law class means: condition number about 2300, and the weak directions dominate NC1."""
    num_classes, dim = 60, 128
    spectrum_K = torch.logspace(0, -math.log10(2300), num_classes, dtype=torch.float64)
    left_KK, right_DK = (torch.linalg.qr(randn(seed, size, 60)).Q for seed, size in ((2, 60), (1, dim)))
    means_KD = left_KK @ (spectrum_K[:, None] * right_DK.T)
    if coincident:
        means_KD[1] = means_KD[0]
    n_K, root_DD = torch.arange(1, 61, dtype=torch.float64), randn(3, dim, dim)
    stats = Statistics(n_K, means_KD, root_DD @ root_DD.T, torch.ones_like(n_K), torch.zeros(dim))
    singular_K = torch.linalg.svdvals(means_KD - n_K @ means_KD / n_K.sum())
    assert 1500 < singular_K[0] / singular_K[58 - coincident] < 3000
    assert nc1(stats) == pytest.approx(nc1_by_svd(stats), rel=1e-9)
    assert rank(stats) == 59 - coincident


@pytest.mark.slow
@pytest.mark.parametrize(("power", "condition", "error"), [(0.5, 68, 1e-12), (1, 2300, 1e-9), (1.5, 8e4, 1e-6)])
def test_weak_directions_of_a_thousand_means(power: float, condition: float, error: float) -> None:
    means_KD = randn(0, 1000, 2048) * torch.arange(1.0, 2049) ** -power
    n_K, root_DD = torch.full((1000,), 50.0, dtype=torch.float64), randn(1, 2048, 64)
    stats = Statistics(n_K, means_KD, root_DD @ root_DD.T + torch.eye(2048), torch.ones_like(n_K), torch.zeros(2048))
    singular_K = torch.linalg.svdvals(means_KD - means_KD.mean(0))
    assert 0.5 * condition < singular_K[0] / singular_K[998] < 2 * condition
    assert nc1(stats) == pytest.approx(nc1_by_svd(stats), rel=error)


@pytest.mark.parametrize(("num_classes", "dim", "dims"), [(6, 20, 4), (12, 5, 5), (5, 3, 3)])
def test_two_coincident_class_means_lower_the_rank(num_classes: int, dim: int, dims: int) -> None:
    means_KD, noise_KD = class_means(num_classes, dim), randn(1, num_classes, dim)
    means_KD[1], noise_KD[1] = means_KD[0], noise_KD[0]
    labels_B = torch.arange(num_classes).repeat(2)
    feats_BD = torch.cat([means_KD + noise_KD, means_KD - noise_KD])
    stats = exact(feats_BD, labels_B, num_classes)
    assert rank(stats) == dims
    assert nc1(stats) == pytest.approx(nc1_by_svd(two_pass(feats_BD, labels_B, num_classes)), rel=1e-9)


def test_collinear_means_in_fewer_dimensions_than_classes() -> None:
    """K > D with Sigma_B singular: D x D Cholesky cannot be used, and one direction is all there is."""
    along_D = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    labels_B = torch.arange(7).repeat(2)
    noise_KD = randn(0, 7, 3)
    stats = exact(labels_B[:, None] * along_D + torch.cat([noise_KD, -noise_KD]), labels_B, 7)
    assert rank(stats) == 1
    between = 4.0  # variance of 0..6
    assert nc1(stats) == pytest.approx(float((noise_KD @ along_D).square().mean()) / between / 7, rel=1e-9)


def test_means_that_differ_by_rounding_alone_are_no_direction() -> None:
    """As a merge leaves them: equal but for the last bit."""
    means_KD = torch.full((3, 8), 0.1, dtype=torch.float64)
    means_KD[1] = torch.nextafter(means_KD[1], torch.ones(8).double())
    ones_K = torch.full((3,), 2.0).double()
    with pytest.raises(Undefined, match="coincide"):
        nc1(Statistics(ones_K, means_KD, torch.eye(8).double(), ones_K, torch.zeros(8)))


def test_metrics_take_accumulators_as_they_take_statistics() -> None:
    moments = accumulated(*clusters(4, 10, 20, 1.0), 4)
    stats = moments.statistics()
    for metric in (nc1, rank, nc1_dof, nc1_rank, nc1_weighted, nc1_balanced, nc1_trace, nc1_pca):
        assert metric(moments) == metric(stats), metric
        assert type(metric(stats)) in (float, int), metric
    assert nc1(replace(stats, scatter_DD=4 * stats.scatter_DD)) == pytest.approx(4 * nc1(stats), rel=1e-12)
