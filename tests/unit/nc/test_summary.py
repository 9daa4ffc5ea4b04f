"""All metrics by name: closed forms, and None with a reason, never NaN, where there is no value.

Letters: B samples, K classes, D dimensions.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from nc_reference import accumulated, clusters, exact, randn, simplex
from torch import Tensor

from nc_dist.nc import HalvedMoments, summary
from nc_dist.nc.metrics import CLASSIFIER_METRICS, LIVE, MOMENT_METRICS, SLOW, warnings

SIZES = ("d", "K", "K_empty", "N", "n_min", "n_max")
COLLAPSED = [  # zero at collapse
    *("nc1", "nc1_pca", "nc1_dof", "nc1_balanced", "nc1_weighted", "nc1_rank", "nc1_trace", "nc1_floor"),
    *(f"nc2_{name}{of}" for name in ("equinorm", "equiangular", "maximal_angle", "etf") for of in ("", "_weight")),
    *("nc3_papyan", "nc3_zhu", "nc3_bias"),
]
ON_MEANS = {"nc1", "rank", "nc1_null", "nc1_floor", "nc1_trace", "nc1_pca", "nc2_equinorm", "nc2_etf", "nc3_zhu"}


def alike(rows_BD: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """So many equal samples of each class."""
    return rows_BD.repeat(times, 1), torch.arange(len(rows_BD)).repeat(times)


CASES = {  # features, labels, number of classes
    "no samples": (torch.empty(0, 8), torch.empty(0, dtype=torch.int64), 3),
    "one class": (randn(0, 5, 8), torch.full((5,), 2), 3),
    "one sample": (randn(0, 1, 8), torch.zeros(1, dtype=torch.int64), 3),
    "coincident means": (*alike(torch.full((3, 8), 0.1), 2), 3),
    "zero means": (*alike(torch.zeros(3, 8), 2), 3),
    "zero means with noise": (torch.cat([randn(0, 3, 8), -randn(0, 3, 8)]).float(), torch.arange(3).repeat(2), 3),
    "two coincident means": (*alike(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), 2), 3),
    "no noise": (*alike(randn(0, 4, 8), 3), 4),
    "one sample a class": (randn(0, 5, 20), torch.arange(5), 5),
    "one sample of one class": (*(rows[:25] for rows in clusters(12, 8, 3, 1.0)), 12),
    "empty classes": (clusters(4, 16, 10, 1.0)[0], 2 * clusters(4, 16, 10, 1.0)[1] + 1, 9),
    "two classes": (*clusters(2, 5, 10, 1.0), 2),
    "two classes on a line": (*clusters(2, 1, 10, 1.0), 2),
    "more classes than dimensions": (*clusters(12, 5, 10, 1.0), 12),
    "fewer samples than dimensions": (*clusters(4, 50, 3, 1.0), 4),
    "as many samples as dimensions": (*clusters(4, 12, 3, 1.0), 4),
    "as many contrasts as dimensions": (*clusters(4, 11, 3, 1.0), 4),
    "huge": (1e12 * clusters(4, 12, 30, 1.0)[0], clusters(4, 12, 30, 1.0)[1], 4),
    "tiny": (1e-12 * clusters(4, 12, 30, 1.0)[0], clusters(4, 12, 30, 1.0)[1], 4),
    "far from the origin": (1e6 + clusters(4, 12, 30, 1.0)[0].float(), clusters(4, 12, 30, 1.0)[1], 4),
}
WEIGHTS = {
    "none": lambda K, D: (None, None),
    "random": lambda K, D: (randn(5, K, D), randn(6, K)),
    "zero": lambda K, D: (torch.zeros(K, D), torch.zeros(K)),
    "one row zero": lambda K, D: (randn(5, K, D) * (torch.arange(K) != 1)[:, None], None),
    "rows alike": lambda K, D: (torch.ones(K, D), None),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_metric_is_a_finite_number_or_none_with_its_reason(case: str, weights: str, dtype: torch.dtype) -> None:
    feats_BD, labels_B, num_classes = CASES[case]
    moments = HalvedMoments(num_classes, feats_BD.shape[1], dtype=dtype)
    moments.update(feats_BD, labels_B)
    found = summary(moments, *WEIGHTS[weights](num_classes, feats_BD.shape[1]))
    json.dumps(found, allow_nan=False)
    assert set(found) == {*SIZES, *MOMENT_METRICS, *CLASSIFIER_METRICS, "reasons", "warnings"}
    assert {name for name, value in found.items() if value is None} == set(found["reasons"])
    assert all(type(found[name]) in (int, float, type(None)) for name in (*MOMENT_METRICS, *CLASSIFIER_METRICS))
    assert all(found["reasons"].values())


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("no samples", "no samples"),
        ("one class", "only one class has samples"),
        ("one sample", "only one class has samples"),
        ("coincident means", "all class means coincide"),
        ("zero means", "all class means coincide"),
        ("zero means with noise", "all class means coincide"),
    ],
)
def test_what_stands_on_class_means_has_no_value_without_them(case: str, reason: str) -> None:
    found = summary(accumulated(*CASES[case]), torch.ones(3, 8))
    assert set(found["reasons"]) >= ON_MEANS
    assert reason in found["reasons"]["nc1"] and reason in found["reasons"]["nc2_etf"]


def test_values_that_are_known_for_degenerate_features() -> None:
    found = {case: summary(exact(*CASES[case])) for case in CASES}
    for name in ("nc1", "nc1_trace", "nc1_rank", "nc1_weighted", "nc1_balanced", "nc1_null", "cdnv", "nc1_dof"):
        assert "one sample a class" in found["one sample a class"]["reasons"][name], name
    assert found["no noise"]["nc1"] < 1e-30
    assert found["two coincident means"]["rank"] == 1 and found["two classes"]["rank"] == 1
    assert found["two classes"]["nc2_etf"] == pytest.approx(0, abs=1e-12)  # two centred means oppose each other
    assert found["two classes on a line"]["nc2_maximal_angle"] == pytest.approx(0, abs=1e-12)
    assert found["more classes than dimensions"]["rank"] == 5
    assert "d = 5 is less than d0 = 2K = 24" in found["more classes than dimensions"]["reasons"]["nc1_pca"]
    assert found["more classes than dimensions"]["gnc2"] > 0
    assert "K = 4 is not above d = 50" in found["fewer samples than dimensions"]["reasons"]["gnc2"]
    for case in ("fewer samples than dimensions", "as many samples as dimensions", "as many contrasts as dimensions"):
        assert found[case]["vci"] is found[case]["h_score"] is None  # 0 and K - 1 whatever the features
        assert found[case]["nc1"] > 0 and found[case]["rank"] == 3
    assert found["empty classes"]["K_empty"] == 5 and found["empty classes"]["rank"] == 3
    reference = summary(exact(*clusters(4, 12, 30, 1.0), 4))
    for case in ("huge", "tiny"):
        assert found[case]["nc1"] == pytest.approx(reference["nc1"], rel=1e-9)
        assert found[case]["rank"] == 3


@pytest.mark.parametrize(("num_classes", "dim"), [(10, 32), (2, 5), (3, 6)])
def test_a_simplex_without_noise_is_fully_collapsed(num_classes: int, dim: int) -> None:
    frame_KD, offset_D = simplex(num_classes, dim), torch.full((dim,), 3.0, dtype=torch.float64)
    stats = exact(*alike(20 * frame_KD + offset_D, 4), num_classes)
    found = summary(stats, 0.7 * frame_KD, -0.7 * frame_KD @ offset_D)
    assert {name: found[name] for name in COLLAPSED} == pytest.approx(dict.fromkeys(COLLAPSED, 0), abs=1e-12)
    assert found["rank"] == num_classes - 1
    sizes = {"d": dim, "K": num_classes, "K_empty": 0, "N": 4 * num_classes, "n_min": 4, "n_max": 4}
    assert {name: found[name] for name in sizes} == sizes


def test_empty_classes_take_no_part() -> None:
    """Classes 2 and 5 without samples: everything as if they did not exist."""
    feats_BD, labels_B = clusters(4, 16, 30, 1.0)
    numbers = torch.tensor([0, 1, 3, 4])
    weight_KD, bias_K = randn(5, 6, 16), randn(6, 6)
    found = summary(exact(feats_BD, numbers[labels_B], 6), weight_KD, bias_K)
    expected = summary(exact(feats_BD, labels_B, 4), weight_KD[numbers], bias_K[numbers])
    assert (found.pop("K_empty"), expected.pop("K_empty")) == (2, 0)
    assert found.pop("reasons") == expected.pop("reasons")
    assert found.pop("warnings") == expected.pop("warnings")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (value if value is None else pytest.approx(value, rel=1e-9)), name


def test_only_what_was_asked_for_is_computed() -> None:
    stats = exact(*clusters(4, 16, 30, 1.0), 4)
    every = summary(stats)
    found = summary(stats, only={"nc1", "nc3_zhu"})
    assert set(found) == {*SIZES, "nc1", "nc3_zhu", "reasons", "warnings"}
    assert found["nc1"] == every["nc1"] and found["reasons"] == {"nc3_zhu": "no classifier"}
    assert set(LIVE) == {*MOMENT_METRICS, *CLASSIFIER_METRICS} - set(SLOW)


def test_warnings_say_how_uneven_classes_are() -> None:
    values = {"K": 4, "d": 8, "rank": 3, "n_min": 3, "n_max": 9, "nc1_split_half": 0.1, "nc1": 1.0, "nc1_floor": 0.1}
    assert warnings(values)[0].startswith("n = 3-9 a class is too small") and "10%" in warnings(values)[0]
    assert warnings({**values, "nc1_split_half": 0.04}) == []
    assert warnings({**values, "nc1_split_half": None, "nc1_floor": None, "nc1": None}) == []
    assert "0.2 is below 3 x 0.1" in warnings({**values, "nc1": 0.2})[1]
    assert "rank 2 of 3" in warnings({**values, "rank": 2})[0]


def test_a_direction_below_the_cut_off_is_told() -> None:
    """Two classes with one true mean: the direction between them, where all of NC1 would be, is under the cut-off."""
    random = torch.Generator().manual_seed(0)
    means = torch.randn(6, 16, generator=random, dtype=torch.float64)
    means[1] = means[0]
    labels = torch.arange(6).repeat(1000)
    noise = 1e-7 * torch.randn(6000, 16, generator=random, dtype=torch.float64)
    found = summary(exact(means[labels] + noise, labels, 6))
    assert found["rank"] == 4 and "rank 4 of 5" in found["warnings"][0]


def test_features_out_of_the_range_of_fp64_products_have_no_value_and_a_reason() -> None:
    feats_BD, labels_B = clusters(3, 12, 30, 1.0)
    stats = exact(feats_BD, labels_B, 3)
    found = summary(replace(stats, quantum_D=stats.quantum_D * torch.inf))
    assert found["nc1_floor"] is None and "not finite" in found["reasons"]["nc1_floor"]
    assert all(value is None or math.isfinite(value) for value in found.values() if not isinstance(value, dict | list))


def test_a_classifier_of_other_features_is_refused() -> None:
    with pytest.raises(ValueError, match=r"classifier weight \(4, 15\)"):
        summary(exact(*clusters(4, 16, 30, 1.0), 4), torch.ones(4, 15))
