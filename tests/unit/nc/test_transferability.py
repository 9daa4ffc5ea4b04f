"""CDNV, H-score and VCI against plain fp64 formulas on the features, and the cases without a value, LogME's among them.

Letters: B samples, K classes, P non-empty classes, D dimensions.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nc_reference import randn, two_pass
from sklearn import covariance
from torch import Tensor

from nc_dist.nc.statistics import CHUNK_ROWS, Statistics, Undefined
from nc_dist.nc.transferability import (
    cdnv,
    cdnv_unbiased,
    h_score,
    h_score_shrunk,
    ledoit_wolf,
    logme,
    nc1_trace_unbiased,
    vci,
    vci_shrunk,
)

OF_MOMENTS = [cdnv, cdnv_unbiased, nc1_trace_unbiased, h_score, vci, logme]
UNEVEN = [9, 0, 30, 2, 17, 0, 5]  # classes 1 and 5 are empty


def features(counts: list[int], dim: int, sigma: float = 1.0, offset: float = 0.0, seed: int = 0):
    """Features (B, D) of isotropic noise about random class means of norm 1, and labels."""
    means_KD = torch.nn.functional.normalize(randn(seed, len(counts), dim)) + offset / math.sqrt(dim)
    labels_B = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return means_KD[labels_B] + sigma / math.sqrt(dim) * randn(seed + 1, len(labels_B), dim), labels_B


def statistics(counts: list[int], dim: int, **how) -> Statistics:
    return two_pass(*features(counts, dim, **how), len(counts))


def quartic(feats_BD: Tensor) -> float:
    return float((feats_BD - feats_BD.mean(0)).square().sum(1).square().sum())


def by_pairs(feats_BD, labels_B, unbiased: bool) -> float:
    found = []
    classes = [feats_BD[labels_B == k] for k in labels_B.unique()]
    for i, a in enumerate(classes):
        for b in classes[i + 1 :]:
            variances = [x.var(0, correction=int(unbiased)).sum() for x in (a, b)]
            distance = (a.mean(0) - b.mean(0)).square().sum()
            distance -= sum(v / len(x) for v, x in zip(variances, (a, b), strict=True)) if unbiased else 0
            found.append(float(sum(variances) / (2 * distance)))
    return float(np.mean(found))


@pytest.mark.parametrize("offset", [0, 1000])
def test_cdnv_and_its_unbiased_form_are_the_means_over_pairs_of_classes(offset):
    feats_BD, labels_B = features(UNEVEN, 12, offset=offset)
    stats = two_pass(feats_BD, labels_B, len(UNEVEN))
    assert cdnv(stats) == pytest.approx(by_pairs(feats_BD, labels_B, unbiased=False), rel=1e-10)
    feats_BD, labels_B = features(UNEVEN, 12, sigma=0.3, offset=offset)
    stats = two_pass(feats_BD, labels_B, len(UNEVEN))
    assert cdnv_unbiased(stats) == pytest.approx(by_pairs(feats_BD, labels_B, unbiased=True), rel=1e-9)


def test_cdnv_of_more_classes_than_a_chunk_counts_every_pair_once():
    classes = 2 * CHUNK_ROWS + 100
    means_KD, within_K = randn(0, classes, 24), randn(1, classes).square()
    n_K = torch.arange(classes).double() % 5
    stats = Statistics(n_K, means_KD * (n_K > 0)[:, None], torch.eye(24).double(), within_K * (n_K > 0), n_K)
    present = n_K > 0
    variance_P = within_K[present] / n_K[present]
    first, second = torch.triu_indices(int(present.sum()), int(present.sum()), 1)
    distances = torch.nn.functional.pdist(means_KD[present])
    expected = ((variance_P[first] + variance_P[second]) / (2 * distances.square())).mean()
    assert cdnv(stats) == pytest.approx(float(expected), rel=1e-11)


def test_cdnv_keeps_its_digits_for_two_close_means_among_distant_ones():
    means_KD = torch.tensor([[1e6, 0], [1e6, 1e-3], [-1e6, 0], [0.0, 3e6]]).double()
    stats = Statistics(
        torch.full((4,), 5.0).double(), means_KD, torch.eye(2).double(), torch.full((4,), 5.0).double(), 0
    )
    distances = [1e-6, 4e12, 1e13, 4e12, (3e6 - 1e-3) ** 2 + 1e12, 1e13]
    # The means' own rounding is 1e-7 of the short distance; |a|^2 + |b|^2 - 2 ab would leave none of its digits.
    assert cdnv(stats) == pytest.approx(np.mean([1 / d for d in distances]), rel=1e-5)


def test_means_that_coincide_or_lie_within_noise_are_named():
    feats_BD, labels_B = features([8, 8, 0, 8, 8], 6)
    stats = two_pass(feats_BD, labels_B, 5)
    stats.means_KD[4] = stats.means_KD[1]
    with pytest.raises(Undefined, match="classes 1 and 4 coincide"):
        cdnv(stats)
    stats.means_KD[4] = stats.means_KD[1] + 1e-3
    assert math.isfinite(cdnv(stats))
    with pytest.raises(Undefined, match="classes 1 and 4 are no farther apart than noise"):
        cdnv_unbiased(stats)


def test_the_corrected_trace_of_sigma_b_is_that_of_the_true_means_for_uneven_classes_and_variances():
    counts, sigmas, dim = [2, 3, 5, 40], torch.tensor([3.0, 1.0, 2.0, 0.5]).double(), 4
    means_KD, share_K = randn(0, 4, dim), torch.tensor(counts).double() / sum(counts)
    truth = float((means_KD - share_K @ means_KD).square().sum(1).mean())
    labels_B, found = torch.repeat_interleave(torch.arange(4), torch.tensor(counts)), []
    for seed in range(1500):
        noise_BD = sigmas[labels_B, None] * randn(seed, len(labels_B), dim)
        stats = two_pass(means_KD[labels_B] + noise_BD, labels_B, 4)
        try:
            found.append(float(stats.within_K.sum()) / (len(labels_B) - 4) / nc1_trace_unbiased(stats))
        except Undefined as why:
            found.append(float(str(why).split("= ")[1].split(",")[0]))
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - truth) < 3 * error
    noise_K = dim * sigmas.square() / torch.tensor(counts)
    for_even_classes = float(noise_K.sum()) * 3 / 16
    exact = float(noise_K @ ((1 - 2 * share_K) / 4 + share_K.square()))
    assert abs(exact - for_even_classes) > 6 * error  # so that the simulation tells the two apart


def test_nc1_trace_unbiased_of_even_classes_has_the_textbook_correction():
    feats_BD, labels_B = features([6] * 5, 8)
    classes = [feats_BD[labels_B == k] for k in range(5)]
    variances = [float(x.var(0).sum()) for x in classes]
    between = sum(float((x.mean(0) - feats_BD.mean(0)).square().sum()) for x in classes) / 5
    expected = np.mean(variances) / (between - 4 / 25 * sum(variances) / 6)
    assert nc1_trace_unbiased(two_pass(feats_BD, labels_B, 5)) == pytest.approx(expected, rel=1e-12)


def test_nc1_trace_unbiased_has_no_value_where_the_means_are_noise():
    stats = statistics([4] * 3, 5)
    stats.means_KD.mul_(1e-3)
    with pytest.raises(Undefined, match="no farther apart than noise"):
        nc1_trace_unbiased(stats)


@pytest.mark.parametrize("metric", [cdnv_unbiased, nc1_trace_unbiased])
def test_a_class_of_one_sample_has_no_unbiased_variance(metric):
    with pytest.raises(Undefined, match="class 2 has one sample"):
        metric(statistics([4, 0, 1, 4], 5))


def explained(feats_BD, labels_B, total_DD=None) -> float:
    """tr(cov(f)^+ cov(E[f|y])) with the covariances over samples."""
    means_BD = torch.stack([feats_BD[labels_B == k].mean(0) for k in labels_B])
    total_DD = torch.cov(feats_BD.T, correction=0) if total_DD is None else total_DD
    return float((torch.linalg.pinv(total_DD, rtol=1e-10, hermitian=True) * torch.cov(means_BD.T, correction=0)).sum())


@pytest.mark.parametrize("counts", [UNEVEN, [20, 40], [1, 30, 1, 12]])
def test_h_score_is_the_explained_variance_and_vci_its_complement(counts):
    feats_BD, labels_B = features(counts, 12, offset=3)
    stats, present = two_pass(feats_BD, labels_B, len(counts)), len(labels_B.unique())
    assert h_score(stats) == pytest.approx(explained(feats_BD, labels_B), rel=1e-9)
    assert vci(stats) == pytest.approx(1 - h_score(stats) / (present - 1), rel=1e-12)
    assert 0 < vci(stats) < 1


def test_h_score_and_vci_do_not_see_linear_maps_and_dead_dimensions():
    feats_BD, labels_B = features(UNEVEN, 8)
    stretched_BD = feats_BD @ (randn(3, 8, 8) * torch.logspace(0, 2, 8).double())
    dead_BD = torch.cat([feats_BD, torch.full((len(feats_BD), 1), 7.0), feats_BD[:, :2] - feats_BD[:, 2:4]], 1)
    for metric in (h_score, vci):
        value = metric(two_pass(feats_BD, labels_B, 7))
        assert metric(two_pass(stretched_BD, labels_B, 7)) == pytest.approx(value, rel=1e-8)
        assert metric(two_pass(dead_BD.double(), labels_B, 7)) == pytest.approx(value, rel=1e-9)


def test_vci_divides_by_the_rank_of_dependent_class_means():
    feats_BD, labels_B = features([10] * 5, 9)
    stats = two_pass(feats_BD, labels_B, 5)
    line_BD = feats_BD - stats.means_KD[labels_B] + labels_B[:, None] * randn(5, 1, 9)
    assert vci(two_pass(line_BD, labels_B, 5)) == pytest.approx(1 - explained(line_BD, labels_B) / 1, rel=1e-9)


def test_collapsed_features_have_vci_zero():
    feats_BD, labels_B = features(UNEVEN, 10, sigma=0)
    assert vci(two_pass(feats_BD, labels_B, 7)) == pytest.approx(0, abs=1e-9)
    feats_BD, labels_B = features(UNEVEN, 10, sigma=1e-3)
    assert vci(two_pass(feats_BD, labels_B, 7)) == pytest.approx(1 - explained(feats_BD, labels_B) / 4, abs=1e-9)


@pytest.mark.parametrize("metric", [h_score, vci])
def test_as_many_dimensions_as_samples_less_one_leave_no_h_score(metric):
    for dim in (62, 63, 100):
        with pytest.raises(Undefined, match=f"D = {dim} is not less than N - 1 = 62"):
            metric(statistics(UNEVEN, dim))
    feats_BD, labels_B = features(UNEVEN, 62)
    assert explained(feats_BD, labels_B) == pytest.approx(4)  # K - 1 whatever the features are: why it has none
    assert math.isfinite(metric(statistics(UNEVEN, 61)))


@pytest.mark.parametrize(("counts", "dim"), [(UNEVEN, 6), (UNEVEN, 62), (UNEVEN, 200), ([3, 1], 20), ([40, 60], 1)])
def test_the_shrinkage_is_that_of_scikit_learn_and_goes_into_h_score_and_vci(counts, dim):
    feats_BD, labels_B = features(counts, dim, sigma=2, offset=3)
    feats_BD = feats_BD * torch.linspace(0.1, 1, dim)
    stats, fourth = two_pass(feats_BD, labels_B, len(counts)), quartic(feats_BD)
    shrunk_DD, intensity = covariance.ledoit_wolf(feats_BD.numpy())
    if dim > 1:  # with one dimension there is nothing to shrink
        assert ledoit_wolf(stats, fourth) == pytest.approx(intensity, rel=1e-10)
    expected = explained(feats_BD, labels_B, torch.from_numpy(shrunk_DD))
    assert h_score_shrunk(stats, fourth) == pytest.approx(expected, rel=1e-9)
    rank = min(len(labels_B.unique()) - 1, dim)
    assert vci_shrunk(stats, fourth) == pytest.approx(1 - expected / rank, rel=1e-9)


@pytest.mark.parametrize("wrong", [0.0, math.nan, math.inf])
def test_fourth_powers_that_cannot_be_of_these_samples_are_refused(wrong):
    with pytest.raises(Undefined, match="quartic .* is not of these samples"):
        h_score_shrunk(statistics(UNEVEN, 6), wrong)


@pytest.mark.parametrize("metric", OF_MOMENTS)
def test_empty_classes_change_nothing(metric):
    feats_BD, labels_B = features([9, 30, 2, 17, 5], 12, sigma=0.3)
    wide_B = torch.tensor([0, 2, 3, 4, 6])[labels_B]
    assert metric(two_pass(feats_BD, wide_B, 8)) == pytest.approx(metric(two_pass(feats_BD, labels_B, 5)), rel=1e-12)


@pytest.mark.parametrize("metric", OF_MOMENTS)
def test_less_than_two_classes_and_equal_means_have_no_value(metric):
    with pytest.raises(Undefined, match="no samples|N - 1 = -1"):
        metric(statistics([0, 0], 5))
    with pytest.raises(Undefined, match="only one class"):
        metric(statistics([0, 9], 5))
    feats_BD, labels_B = features([6, 9], 5)
    same_BD = feats_BD - torch.stack([feats_BD[labels_B == k].mean(0) for k in labels_B])
    stats = two_pass(same_BD, labels_B, 2)
    stats.means_KD.fill_(3.0)
    with pytest.raises(Undefined, match="coincide"):
        metric(stats)


def test_two_classes_of_one_dimension_by_hand():
    feats_BD, labels_B = torch.tensor([[0.0], [2.0], [9.0], [11.0]]).double(), torch.tensor([0, 0, 1, 1])
    stats = two_pass(feats_BD, labels_B, 2)  # means 1 and 10, mu_G 5.5, every v_k 1, or 2 with n_k - 1
    assert cdnv(stats) == pytest.approx(1 / 81, rel=1e-12)
    assert cdnv_unbiased(stats) == pytest.approx(2 / (81 - 2), rel=1e-12)
    assert nc1_trace_unbiased(stats) == pytest.approx(2 / (20.25 - 0.5), rel=1e-12)
    assert h_score(stats) == pytest.approx(20.25 / 21.25, rel=1e-12)
    assert vci(stats) == pytest.approx(1 / 21.25, rel=1e-12)
    assert ledoit_wolf(stats, quartic(feats_BD)) == 0
