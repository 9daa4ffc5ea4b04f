"""LogME against its fixed point on the SVD of the features, dense marginal likelihoods, and limits.

Letters: B samples, K classes, D dimensions.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nc_reference import randn, two_pass
from scipy.optimize import minimize_scalar

from nc_dist.nc.statistics import Undefined
from nc_dist.nc.transferability import logme


def features(counts: list[int], dim: int, sigma: float = 1.0, offset: float = 0.0, seed: int = 0):
    """Features (B, D) of isotropic noise about random class means of norm 1, and labels."""
    means_KD = torch.nn.functional.normalize(randn(seed, len(counts), dim)) + offset / math.sqrt(dim)
    labels_B = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return means_KD[labels_B] + sigma / math.sqrt(dim) * randn(seed + 1, len(labels_B), dim), labels_B


def logme_by_fixed_point(feats_BD, labels_B) -> float:
    """Iterates alpha and beta from 1, on the SVD of the features, and evaluates the evidence term by term."""
    feats, labels = feats_BD.numpy(), labels_B.numpy()
    left, singular, _ = np.linalg.svd(feats, full_matrices=False)
    values, size, evidences = singular**2, len(feats), []
    for k in np.unique(labels):
        target = (labels == k).astype(float)
        parts = left.T @ target
        outside = np.sum((target - left @ parts) ** 2) if len(values) < size else 0.0
        alpha = beta = 1.0
        for _ in range(20_000):
            gamma = np.sum(beta * values / (alpha + beta * values))
            norm = np.sum((beta * singular * parts / (alpha + beta * values)) ** 2)
            residual = outside + np.sum((alpha * parts / (alpha + beta * values)) ** 2)
            before, alpha, beta = alpha / beta, gamma / norm, (size - gamma) / residual
            if abs(alpha / beta - before) <= 1e-13 * before:
                break
        else:
            raise AssertionError("not converged: choose other features")
        evidences.append(
            (size * np.log(beta) + len(values) * np.log(alpha) - size * np.log(2 * np.pi)) / 2
            - (beta * residual + alpha * norm + np.sum(np.log(alpha + beta * values))) / 2
        )
    return float(np.mean(evidences) / size)


def logme_by_marginal(feats_BD, labels_B) -> float:
    """The largest density of y_k under N(0, (I + F F^T/t)/beta), beta at its best: dense, over a fine grid of ln t."""
    gram, size = (feats_BD @ feats_BD.T).numpy(), len(feats_BD)

    def evidence(log_ratio: float, target: np.ndarray) -> float:
        covariance_BB = np.eye(size) + gram * np.exp(-log_ratio)
        left = target @ np.linalg.solve(covariance_BB, target)
        return -(size * np.log(2 * np.pi * np.e * left / size) + np.linalg.slogdet(covariance_BB)[1]) / 2

    evidences = []
    for k in labels_B.unique():
        target = (labels_B == k).double().numpy()
        grid = np.arange(-12, 40, 0.2)
        best = grid[np.argmax([evidence(u, target) for u in grid])]
        found = minimize_scalar(lambda u, y=target: -evidence(u, y), bounds=(best - 0.3, best + 0.3), method="bounded")
        evidences.append(-found.fun)
    return float(np.mean(evidences) / size)


@pytest.mark.parametrize(
    ("counts", "dim", "sigma", "offset"),
    [
        ([20] * 5, 8, 1.0, 0.0),
        ([9, 0, 30, 4, 17, 0, 5], 8, 0.5, 3.0),
        ([25, 40], 10, 0.5, 1.0),
        ([12, 30, 20], 100, 2.0, 1.0),
        ([12, 0, 30, 20], 62, 2.0, 1.0),
        ([12, 0, 30, 20], 61, 2.0, 1.0),
        ([30] * 6, 20, 1e-2, 0.0),
    ],
)
def test_logme_is_the_evidence_at_the_fixed_point_on_the_features(counts, dim, sigma, offset):
    feats_BD, labels_B = features(counts, dim, sigma=sigma, offset=offset)
    found = logme(two_pass(feats_BD, labels_B, len(counts)))
    assert found == pytest.approx(logme_by_fixed_point(feats_BD, labels_B), abs=1e-10)


def test_logme_takes_a_class_of_one_sample_and_rectified_features():
    feats_BD, labels_B = features([1, 12, 30], 10, sigma=0.5, offset=2)
    feats_BD = feats_BD.clamp(min=0)
    expected = logme_by_marginal(feats_BD, labels_B)
    assert logme(two_pass(feats_BD, labels_B, 3)) == pytest.approx(expected, abs=1e-9)


def test_logme_of_collapsed_features_keeps_its_digits():
    feats_BD, labels_B = features([40] * 6, 20, sigma=1e-4)
    found = logme(two_pass(feats_BD, labels_B, 6))
    assert found == pytest.approx(logme_by_fixed_point(feats_BD, labels_B), abs=1e-8)


def test_logme_is_the_largest_of_several_maxima_and_so_does_not_depend_on_the_scale_of_the_features():
    generator = np.random.default_rng(11)
    labels_B = torch.arange(2).repeat_interleave(4)
    feats = generator.standard_normal((2, 6))[labels_B] * 0.5 + generator.standard_normal((8, 6))
    feats_BD = torch.from_numpy(feats) * torch.tensor([1, 1, 1, 100, 100, 100])
    stats = two_pass(feats_BD, labels_B, 2)
    assert logme(stats) == pytest.approx(logme_by_marginal(feats_BD, labels_B), abs=1e-9)
    assert logme(stats) > logme_by_fixed_point(feats_BD, labels_B) + 0.1  # caught in a lower maximum
    assert logme(two_pass(feats_BD * 1e-4, labels_B, 2)) == pytest.approx(logme(stats), abs=1e-10)


def test_a_class_whose_mean_says_nothing_counts_with_the_evidence_of_noise_alone():
    """Its best alpha is infinite: w = 0, and y_k is noise of variance n_k/N."""
    feats_BD, labels_B = features([12, 12, 12], 6)
    feats_BD[labels_B == 0] -= feats_BD[labels_B == 0].mean(0)
    mirrored_BD, labels_B = torch.cat([feats_BD, -feats_BD]), labels_B.repeat(2)
    shifted_BD = mirrored_BD + 1e-3 * (labels_B == 2)[:, None]  # or all means would be zero
    noise_alone = -math.log(2 * math.pi * math.e / 3) / 2
    assert logme(two_pass(shifted_BD, labels_B, 3)) == pytest.approx(noise_alone, abs=1e-12)


def test_features_that_fit_the_labels_exactly_have_no_evidence():
    feats_BD, labels_B = features([5, 6, 7], 8, sigma=0)
    feats_BD = (64 * feats_BD).round()  # so that the scatter is zero, not rounding
    with pytest.raises(Undefined, match="fit class . exactly"):
        logme(two_pass(feats_BD, labels_B, 3))
    one_exact_BD = torch.cat([feats_BD + 0.1 * randn(9, *feats_BD.shape), (labels_B == 1).double()[:, None]], 1)
    with pytest.raises(Undefined, match="fit class 1 exactly"):
        logme(two_pass(one_exact_BD, labels_B, 3))


def test_scatter_that_drowns_beside_the_means_has_no_evidence_rather_than_a_wrong_one():
    with pytest.raises(Undefined, match="too weak"):
        logme(two_pass(*features([40] * 6, 20, sigma=1e-7), 6))
