"""NC2 and NC3 against plain loops over the definitions, and closed forms.

Letters: K classes, D dimensions.
"""

from __future__ import annotations

import math

import pytest
import torch
from nc_reference import clusters, exact, randn, simplex
from torch import Tensor

from nc_dist.nc import Undefined
from nc_dist.nc.geometry import (
    nc2_equiangular,
    nc2_equinorm,
    nc2_etf,
    nc2_maximal_angle,
    nc3_bias,
    nc3_papyan,
    nc3_zhu,
)
from nc_dist.nc.statistics import centred_means

NC2 = (nc2_equinorm, nc2_equiangular, nc2_maximal_angle, nc2_etf)


def to_simplex(gram_KK: Tensor) -> float:
    size = len(gram_KK)
    target_KK = (torch.eye(size, dtype=torch.float64) - 1 / size) / (size - 1) ** 0.5
    return float((gram_KK / gram_KK.norm() - target_KK).norm())


def test_nc2_by_its_definitions() -> None:
    rows_KD = randn(0, 6, 16) + 1
    norms = [float(row.norm()) for row in rows_KD]
    mean = sum(norms) / 6
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    cosines = [float(rows_KD[i] @ rows_KD[j]) / norms[i] / norms[j] for i, j in pairs]
    mean_cosine = sum(cosines) / 30
    assert nc2_equinorm(rows_KD) == pytest.approx(math.sqrt(sum((n - mean) ** 2 for n in norms) / 6) / mean, rel=1e-12)
    expected = math.sqrt(sum((cosine - mean_cosine) ** 2 for cosine in cosines) / 30)
    assert nc2_equiangular(rows_KD) == pytest.approx(expected, rel=1e-12)
    assert nc2_maximal_angle(rows_KD) == pytest.approx(sum(abs(c + 1 / 5) for c in cosines) / 30, rel=1e-12)
    assert nc2_etf(rows_KD) == pytest.approx(to_simplex(rows_KD @ rows_KD.T), rel=1e-12)


def test_nc3_by_its_definitions() -> None:
    feats_BD, labels_B = clusters(6, 16, 30, 1.0)
    stats, weight_KD, bias_K = exact(feats_BD, labels_B, 6), randn(9, 6, 16), randn(8, 6)
    centred_KD = torch.stack([feats_BD[labels_B == k].mean(0) for k in range(6)]) - feats_BD.mean(0)
    difference_KD = weight_KD / weight_KD.norm() - centred_KD / centred_KD.norm()
    assert nc3_papyan(stats, weight_KD) == pytest.approx(float(difference_KD.norm()), rel=1e-12)
    assert nc3_zhu(stats, weight_KD) == pytest.approx(to_simplex(weight_KD @ centred_KD.T), rel=1e-12)
    logits_K = weight_KD @ feats_BD.mean(0)
    assert nc3_bias(stats, weight_KD, bias_K) == pytest.approx(float((logits_K + bias_K).norm()), rel=1e-12)
    assert nc3_bias(stats, weight_KD) == pytest.approx(float(logits_K.norm()), rel=1e-12)


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 5), (3, 3), (10, 32), (40, 64)])
def test_a_simplex_with_its_own_classifier_has_no_distance_from_collapse(num_classes: int, dim: int) -> None:
    frame_KD, offset_D = simplex(num_classes, dim), torch.full((dim,), 3.0, dtype=torch.float64)
    labels_B = torch.arange(num_classes).repeat(4)
    stats = exact((20 * frame_KD + offset_D)[labels_B], labels_B, num_classes)
    weight_KD = 0.7 * frame_KD
    found = [metric(rows_KD) for metric in NC2 for rows_KD in (centred_means(stats), weight_KD)]
    found += [
        nc3_papyan(stats, weight_KD),
        nc3_zhu(stats, weight_KD),
        nc3_bias(stats, weight_KD, -weight_KD @ offset_D),
    ]
    assert found == pytest.approx([0] * 11, abs=1e-12)


def test_the_geometry_does_not_feel_scale_and_is_of_the_rows_as_they_are_given() -> None:
    rows_KD = randn(0, 5, 8)
    for metric in NC2:
        assert metric((1e-6 * rows_KD).requires_grad_()) == pytest.approx(metric(rows_KD), rel=1e-12)
    assert nc2_equinorm(torch.tensor([[3.0, 0], [0, 4], [5, 0]])) == pytest.approx(math.sqrt(2 / 3) / 4, rel=1e-12)


@pytest.mark.parametrize("metric", NC2)
def test_rows_that_have_no_geometry_say_so(metric) -> None:
    with pytest.raises(Undefined, match="no samples"):
        metric(torch.empty(0, 4))
    with pytest.raises(Undefined, match="only one class"):
        metric(torch.ones(1, 4))
    with pytest.raises(Undefined, match="zero"):
        metric(torch.zeros(3, 4))


def test_one_row_that_is_zero_has_a_norm_but_no_angle() -> None:
    rows_KD = torch.tensor([[1.0, 0], [0, 1], [0, 0]])
    assert nc2_equinorm(rows_KD) == pytest.approx(math.sqrt(2) / 2, rel=1e-12)
    for metric in (nc2_equiangular, nc2_maximal_angle):
        with pytest.raises(Undefined, match="makes no angle"):
            metric(rows_KD)


def test_wrong_shapes_and_damaged_classifiers_are_refused() -> None:
    stats = exact(*clusters(3, 4, 5, 1.0), 3)
    with pytest.raises(ValueError, match=r"classifier weight \(3, 5\).* shape \(3, 4\)"):
        nc3_papyan(stats, torch.ones(3, 5))
    with pytest.raises(ValueError, match="finite"):
        nc3_zhu(stats, torch.full((3, 4), torch.nan))
    with pytest.raises(ValueError, match=r"classifier bias \(1,\)"):
        nc3_bias(stats, torch.ones(3, 4), torch.ones(1))
    with pytest.raises(Undefined, match="zero"):
        nc3_zhu(stats, torch.zeros(3, 4))
