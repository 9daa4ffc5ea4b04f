"""NC1 to NC4 against plain fp64 formulas on the features, closed forms, and the cases without a value.

Letters: B samples, K classes, D dimensions.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from nc_dist import nc
from nc_dist.nc import ClassMoments, Statistics


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(seed, *shape) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(feats_BD, labels_B, num_classes, batch=256) -> Statistics:
    moments = ClassMoments(num_classes, feats_BD.shape[1])
    for start in range(0, len(feats_BD), batch):
        moments.update(feats_BD[start : start + batch], labels_B[start : start + batch])
    return moments.statistics()


def clusters(num_classes, dim, per_class, sigma, seed=0, norm=20.0):
    """fp64 features of isotropic noise about random class means, classes interleaved."""
    means_KD = randn(seed, num_classes, dim)
    means_KD *= norm / means_KD.norm(dim=1, keepdim=True)
    labels_B = torch.arange(num_classes).repeat(per_class)
    return means_KD[labels_B] + sigma * randn(seed + 1, len(labels_B), dim), labels_B


def simplex(num_classes, dim, seed=0) -> Tensor:
    """K unit vectors of an equiangular tight frame, turned into D dimensions."""
    frame = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    rotation = torch.linalg.qr(randn(seed, dim, num_classes)).Q
    return frame @ rotation.T * math.sqrt(num_classes / (num_classes - 1))


def scatters(feats_BD, labels_B):
    """Sigma_W, Sigma_B, sample mean and class means, by the definition."""
    feats_BD = feats_BD.double()
    means_KD = torch.stack([feats_BD[labels_B == k].mean(0) for k in labels_B.unique()])
    row_B = torch.searchsorted(labels_B.unique(), labels_B)
    residuals_BD, centred_KD = feats_BD - means_KD[row_B], means_KD - feats_BD.mean(0)
    sigma_w = residuals_BD.T @ residuals_BD / len(feats_BD)
    return sigma_w, centred_KD.T @ centred_KD / len(means_KD), centred_KD


def nc1_by_pinv(feats_BD, labels_B) -> float:
    sigma_w, sigma_b, centred_KD = scatters(feats_BD, labels_B)
    return float((sigma_w * torch.linalg.pinv(sigma_b, rtol=1e-10, hermitian=True)).sum() / len(centred_KD))


@pytest.mark.parametrize("sigma", [1, 1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(
    ("num_classes", "dim", "per_class"), [(10, 64, 100), (100, 64, 20), (10, 512, 60), (100, 512, 20)]
)
def test_nc1_is_accurate_however_collapsed(num_classes, dim, per_class, sigma):
    feats_BD, labels_B = clusters(num_classes, dim, per_class, sigma)
    feats_BD = feats_BD.float()
    found = nc.nc1(moments_of(feats_BD, labels_B, num_classes))
    assert found.value == pytest.approx(nc1_by_pinv(feats_BD, labels_B), rel=1e-6)
    assert found.rank == min(num_classes - 1, dim)


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 5), (2, 1), (3, 2), (8, 8), (9, 8), (30, 8)])
def test_nc1_of_uneven_classes_in_fp64(num_classes, dim):
    """K = 2, K - 1 < D, K - 1 = D, K > D; class sizes 1, 2, ...; one class number without samples."""
    labels_B = torch.repeat_interleave(torch.arange(num_classes), torch.arange(1, num_classes + 1))
    feats_BD = randn(1, num_classes, dim)[labels_B] * 3 + randn(2, len(labels_B), dim) + 50
    found = nc.nc1(moments_of(feats_BD, labels_B + 1, num_classes + 1))
    assert found.value == pytest.approx(nc1_by_pinv(feats_BD, labels_B), rel=1e-9)
    assert found.rank == min(num_classes - 1, dim)


@pytest.mark.parametrize("coincident", [False, True])
def test_nc1_of_power_law_means_against_thin_svd(coincident):
    """Condition number of the centred means about 2300; their weak directions dominate NC1."""
    num_classes, dim = 60, 128
    spectrum_K = torch.logspace(0, -math.log10(2300), num_classes, dtype=torch.float64)
    left, right = torch.linalg.qr(randn(2, num_classes, num_classes)).Q, torch.linalg.qr(randn(1, dim, 60)).Q
    means_KD = left @ (spectrum_K[:, None] * right.T)
    if coincident:
        means_KD[1] = means_KD[0]
    n_K = torch.arange(1, num_classes + 1, dtype=torch.float64)
    stats = Statistics(n_K, means_KD, (root := randn(3, dim, dim)) @ root.T, torch.ones_like(n_K))

    centred_KD = (means_KD - n_K @ means_KD / n_K.sum()) / num_classes**0.5
    rank = num_classes - 1 - coincident
    _, singular, directions = torch.linalg.svd(centred_KD, full_matrices=False)
    whitened = (directions / singular[:, None])[:rank]
    expected = float((whitened @ (stats.scatter_DD / n_K.sum()) @ whitened.T).trace() / num_classes)
    assert 1500 < singular[0] / singular[rank - 1] < 3000
    assert nc.nc1(stats) == (pytest.approx(expected, rel=1e-9), rank)


@pytest.mark.parametrize(("num_classes", "dim", "rank"), [(6, 20, 4), (12, 5, 5), (5, 3, 3)])
def test_two_coincident_class_means_lower_the_rank(num_classes, dim, rank):
    feats_KD = randn(0, num_classes, dim)
    feats_KD[1] = feats_KD[0]
    noise_KD = randn(1, num_classes, dim)
    labels = torch.arange(num_classes).repeat(2)
    noise_KD[1] = noise_KD[0]
    feats_BD = torch.cat([feats_KD + noise_KD, feats_KD - noise_KD])
    found = nc.nc1(moments_of(feats_BD, labels, num_classes))
    assert found.rank == rank
    assert found.value == pytest.approx(nc1_by_pinv(feats_BD, labels), rel=1e-9)


def test_collinear_means_in_fewer_dimensions_than_classes():
    """K > D with Sigma_B singular: D x D Cholesky cannot be used, and one direction is all there is."""
    along_D = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    labels_B = torch.arange(7).repeat(2)
    noise_KD = randn(0, 7, 3)
    feats_BD = labels_B[:, None] * along_D + torch.cat([noise_KD, -noise_KD])
    found = nc.nc1(moments_of(feats_BD, labels_B, 7))
    assert found.rank == 1
    between = 4.0  # variance of 0..6
    assert found.value == pytest.approx(float((noise_KD @ along_D).square().mean()) / between / 7, rel=1e-9)


def test_simplex_without_noise_is_fully_collapsed():
    num_classes, dim = 10, 32
    frame_KD = simplex(num_classes, dim)
    labels = torch.arange(num_classes).repeat(4)
    stats = moments_of((frame_KD * 20 + 3)[labels], labels, num_classes)
    found = nc.summary(stats, frame_KD * 0.7, -0.7 * frame_KD @ torch.full((dim,), 3.0, dtype=torch.float64))
    zero = [name for name in found if name.startswith("nc")]
    assert len(zero) == 14 and found["reasons"] == {}
    assert {name: found[name] for name in zero} == pytest.approx(dict.fromkeys(zero, 0), abs=1e-12)
    sizes = {"d": 32, "K": 10, "K_empty": 0, "N": 40, "n_min": 4, "n_max": 4, "rank": 9}
    assert {name: found[name] for name in sizes} == sizes


def test_nc2_and_nc3_by_their_definitions():
    feats_BD, labels_B = clusters(6, 16, 30, 1.0)
    stats, weight_KD, bias_K = moments_of(feats_BD, labels_B, 6), randn(9, 6, 16), randn(8, 6)
    _, _, centred_KD = scatters(feats_BD, labels_B)
    norms = [float(row.norm()) for row in centred_KD]
    mean = sum(norms) / 6
    std = math.sqrt(sum((norm - mean) ** 2 for norm in norms) / 6)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    cosines = [float(centred_KD[i] @ centred_KD[j]) / norms[i] / norms[j] for i, j in pairs]
    mean_cosine = sum(cosines) / 30
    simplex_KK = (torch.eye(6, dtype=torch.float64) - 1 / 6) / 5**0.5

    def to_simplex(gram: Tensor) -> float:
        return float((gram / gram.norm() - simplex_KK).norm())

    expected = {
        "nc2_equinorm": std / mean,
        "nc2_equiangular": math.sqrt(sum((cosine - mean_cosine) ** 2 for cosine in cosines) / 30),
        "nc2_maximal_angle": sum(abs(cosine + 1 / 5) for cosine in cosines) / 30,
        "nc2_etf": to_simplex(centred_KD @ centred_KD.T),
        "nc2_etf_weight": to_simplex(weight_KD @ weight_KD.T),
        "nc3_papyan": float((weight_KD / weight_KD.norm() - centred_KD / centred_KD.norm()).norm()),
        "nc3_zhu": to_simplex(weight_KD @ centred_KD.T),
        "nc3_bias": float((weight_KD @ feats_BD.mean(0) + bias_K).norm()),
    }
    found = nc.summary(stats, weight_KD, bias_K)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_trace_ratio_and_pca_against_the_features():
    feats_BD, labels_B = clusters(4, 40, 50, 2.0)
    sigma_w, sigma_b, _ = scatters(feats_BD, labels_B)
    stats = moments_of(feats_BD, labels_B, 4)
    assert nc.nc1_trace(stats) == pytest.approx(float(sigma_w.trace() / sigma_b.trace()), rel=1e-9)
    right = torch.linalg.svd(feats_BD - feats_BD.mean(0), full_matrices=False).Vh
    assert nc.nc1_pca(stats) == pytest.approx(nc1_by_pinv(feats_BD @ right[:8].T, labels_B), rel=1e-9)
    whole = moments_of(feats_BD[:, :8], labels_B, 4)
    assert nc.nc1_pca(whole) == pytest.approx(nc.nc1(whole).value, rel=1e-9)


def test_nc4_and_nearest_centre_sum_over_batches():
    feats_BD, labels_B = clusters(7, 12, 40, 4.0)
    feats_BD = feats_BD * (1 + labels_B[:, None]) + 1000  # means of unequal norm, and a common offset
    stats, weight_KD, bias_K = moments_of(feats_BD, labels_B, 7), randn(3, 7, 12), randn(4, 7)
    nearest_B = torch.cdist(feats_BD, stats.means_KD, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    agree = int(((feats_BD @ weight_KD.T + bias_K).argmax(1) == nearest_B).sum())
    batches = [(feats_BD[i : i + 33], labels_B[i : i + 33]) for i in range(0, 330, 33)]  # the last is empty
    nc4 = [nc.nc4(feats, stats, weight_KD, bias_K) for feats, _ in batches]
    hits = [nc.ncc_hits(feats, labels, stats) for feats, labels in batches]
    assert tuple(map(sum, zip(*nc4, strict=True))) == (agree, 280)
    assert tuple(map(sum, zip(*hits, strict=True))) == (int((nearest_B == labels_B).sum()), 280)
    assert 0 < agree < 280


def test_nearest_class_means_as_classifier_agree_always():
    feats_BD, labels_B = clusters(7, 12, 40, 4.0)
    stats = moments_of(feats_BD, labels_B, 7)
    weight_KD, bias_K = stats.means_KD, -stats.means_KD.square().sum(1) / 2
    assert nc.nc4(feats_BD, stats, weight_KD, bias_K) == (280, 280)


def test_empty_classes_take_no_part():
    """Classes 2 and 5 without samples: everything as if they did not exist."""
    feats_BD, labels_B = clusters(4, 16, 30, 1.0)
    numbers = torch.tensor([0, 1, 3, 4])
    weight_CD, bias_C = randn(5, 6, 16) * 100, randn(6, 6)
    some = moments_of(feats_BD, numbers[labels_B], 6)
    alone = moments_of(feats_BD, labels_B, 4)
    found, expected = (
        nc.summary(some, weight_CD, bias_C),
        nc.summary(alone, weight_CD[numbers], bias_C[numbers]),
    )
    assert (found.pop("K_empty"), expected.pop("K_empty")) == (2, 0)
    assert found.pop("reasons") == expected.pop("reasons") == {}
    assert found == pytest.approx(expected, rel=1e-12)
    assert nc.nc4(feats_BD, some, weight_CD, bias_C) == nc.nc4(feats_BD, alone, weight_CD[numbers], bias_C[numbers])
    assert nc.ncc_hits(feats_BD, numbers[labels_B], some) == (120, 120)
    assert nc.nc4(feats_BD, some, some.means_KD, -some.means_KD.square().sum(1) / 2) == (120, 120)


@pytest.mark.parametrize(
    ("feats", "labels", "reason"),
    [
        (torch.empty(0, 8), torch.empty(0, dtype=torch.int64), "no samples"),
        (torch.ones(5, 8), torch.full((5,), 2), "only one class"),
        (torch.full((6, 8), 0.1), torch.arange(6) % 3, "all class means coincide"),
        (torch.zeros(6, 8), torch.arange(6) % 3, "all class means coincide"),
    ],
)
def test_no_value_is_none_with_its_reason(feats, labels, reason):
    found = nc.summary(moments_of(feats, labels, 3), torch.zeros(3, 8))
    json.dumps(found, allow_nan=False)
    undefined = {name for name, value in found.items() if value is None}
    assert undefined == set(found["reasons"])
    assert undefined >= {
        "nc1",
        "rank",
        "nc1_trace",
        "nc1_pca",
        "nc2_equinorm",
        "nc2_etf",
        "nc3_papyan",
        "nc3_zhu",
    }
    assert reason in found["reasons"]["nc1"]


def test_coincident_up_to_rounding_after_a_merge():
    """Equal means that differ in the last bit, as a merge leaves them, are not a direction."""
    means_KD = torch.full((3, 8), 0.1, dtype=torch.float64)
    means_KD[1] = torch.nextafter(means_KD[1], torch.ones(8).double())
    stats = Statistics(torch.ones(3).double(), means_KD, torch.eye(8).double(), torch.ones(3).double())
    with pytest.raises(nc.Undefined, match="coincide"):
        nc.nc1(stats)


def test_one_sample_a_class_has_no_scatter():
    found = nc.summary(moments_of(randn(0, 5, 20), torch.arange(5), 5))
    assert (found["nc1"], found["nc1_trace"], found["n_max"]) == (0, 0, 1)


def test_narrow_features_are_not_comparable_and_a_missing_classifier_is_said():
    feats_BD, labels_B = clusters(5, 9, 20, 1.0)
    found = nc.summary(moments_of(feats_BD, labels_B, 5))
    assert found["nc1_pca"] is None and "D = 9 is less than d0 = 2K = 10" in found["reasons"]["nc1_pca"]
    assert found["nc3_zhu"] is None and found["reasons"]["nc3_zhu"] == "no classifier"
    assert found["nc1"] > 0


def test_nc1_does_not_feel_scale_rotation_or_autocast():
    feats_BD, labels_B = clusters(5, 16, 40, 1.0)
    value = nc.nc1(moments_of(feats_BD, labels_B, 5)).value
    rotation = torch.linalg.qr(randn(7, 16, 16)).Q
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned = nc.nc1(moments_of(1e-6 * feats_BD @ rotation, labels_B, 5)).value
    assert turned == pytest.approx(value, rel=1e-9)


def test_wrong_shapes_and_damaged_classifiers_are_refused():
    feats_BD, labels_B = clusters(3, 4, 5, 1.0)
    stats = moments_of(feats_BD, labels_B, 3)
    with pytest.raises(ValueError, match=r"classifier weight \(3, 5\)"):
        nc.nc3_papyan(stats, torch.ones(3, 5))
    with pytest.raises(ValueError, match="finite"):
        nc.nc3_zhu(stats, torch.full((3, 4), torch.nan))
    with pytest.raises(ValueError, match=r"classifier bias \(1,\)"):
        nc.nc3_bias(stats, torch.ones(3, 4), torch.ones(1))
    with pytest.raises(ValueError, match=r"labels \(1,\)"):
        nc.ncc_hits(feats_BD, labels_B[:1], stats)
    with pytest.raises(ValueError, match="features"):
        nc.nearest_centre(feats_BD[:, :3], stats)
