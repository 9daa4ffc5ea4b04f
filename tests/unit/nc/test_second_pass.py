"""NC4, nearest centres and NC1 class by class, from a second look at the features.

Letters: B samples, K classes, D dimensions.
"""

from __future__ import annotations

import pytest
import torch
from nc_reference import clusters, exact, nc1_by_svd, randn, scattered, two_pass
from torch import Tensor

from nc_dist.nc import SecondPass, Statistics, combined, summary
from nc_dist.nc.second_pass import nc4, ncc_hits, nearest_centre
from nc_dist.nc.variability import nc1


def crowded() -> tuple[Tensor, Tensor]:
    """Class means of unequal norm, a common offset, and samples that lie nearer to another class."""
    feats_BD, labels_B = clusters(7, 12, 40, 8.0)
    return feats_BD * (1 + labels_B[:, None]) + 1000, labels_B


def second_look(feats_BD, labels_B, stats, classifier=None, batch=33) -> dict:
    second = SecondPass(stats, classifier)
    for feats, labels in zip(feats_BD.split(batch), labels_B.split(batch), strict=True):
        second.update(feats, labels)
    return second.metrics(lambda tensor: tensor)


def test_nc4_and_nearest_centre_sum_over_batches() -> None:
    feats_BD, labels_B = crowded()
    stats, weight_KD, bias_K = exact(feats_BD, labels_B, 7), randn(3, 7, 12), randn(4, 7)
    nearest_B = torch.cdist(feats_BD, stats.means_KD, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    agree = int(((feats_BD @ weight_KD.T + bias_K).argmax(1) == nearest_B).sum())
    hits = int((nearest_B == labels_B).sum())
    assert 0 < agree < 280 and 0 < hits < 280
    batches = [(feats_BD[i : i + 33], labels_B[i : i + 33]) for i in range(0, 330, 33)]  # the last is empty
    found = [nc4(feats, stats, weight_KD, bias_K) for feats, _ in batches]
    assert tuple(map(sum, zip(*found, strict=True))) == (agree, 280)
    found = [ncc_hits(feats, labels, stats) for feats, labels in batches]
    assert tuple(map(sum, zip(*found, strict=True))) == (hits, 280)
    found = second_look(feats_BD, labels_B, stats, (weight_KD, bias_K))
    assert (found["nc4"], found["ncc_acc1"]) == (agree / 280, hits / 280)


def test_nearest_class_means_as_classifier_agree_always() -> None:
    feats_BD, labels_B = crowded()
    stats = exact(feats_BD, labels_B, 7)
    weight_KD, bias_K = stats.means_KD, -stats.means_KD.square().sum(1) / 2
    assert nc4(feats_BD, stats, weight_KD, bias_K) == (280, 280)


@pytest.mark.parametrize(("num_classes", "dim"), [(6, 20), (20, 6), (2, 3)])
def test_nc1_class_by_class_and_balanced_are_those_of_their_definitions(num_classes: int, dim: int) -> None:
    """In the span of the means K <= D and K > D; uneven classes, of which some lack samples."""
    feats_BD, labels_B = scattered(0, 200, num_classes, dim, sigma=2.0)
    feats_BD, labels_B = feats_BD[labels_B % 5 != 4], labels_B[labels_B % 5 != 4]
    means_PD = torch.stack([feats_BD[labels_B == k].mean(0) for k in labels_B.unique()])
    sizes_P, classes = torch.bincount(labels_B)[labels_B.unique()], len(means_PD)

    def class_by_class(centre_D: Tensor) -> Tensor:
        """(1/K) tr(S_k/n_k Sigma_B^+) with class means about this centre."""
        centred_PD = means_PD - centre_D
        inverse = torch.linalg.pinv(centred_PD.T @ centred_PD / classes, rtol=1e-10, hermitian=True)
        residuals = [feats_BD[labels_B == k] - mean for k, mean in zip(labels_B.unique(), means_PD, strict=True)]
        return torch.stack([(each.T @ each / len(each) * inverse).sum() for each in residuals]) / classes

    stats = exact(feats_BD, labels_B, num_classes)
    found = second_look(feats_BD, labels_B, stats)
    per_class_P = class_by_class(feats_BD.mean(0))
    per_class = [value for value in found["nc1_per_class"] if value is not None]
    assert per_class == pytest.approx(per_class_P.tolist(), rel=1e-9)
    mean = float(sizes_P.double() @ torch.tensor(per_class, dtype=torch.float64) / len(labels_B))
    assert mean == pytest.approx(nc1(stats), rel=1e-9)
    assert nc1(stats) == pytest.approx(nc1_by_svd(two_pass(feats_BD, labels_B, num_classes)), rel=1e-9)
    balanced = float(class_by_class(means_PD.mean(0)).mean())
    assert found["nc1_balanced"] == pytest.approx(balanced, rel=1e-9)
    assert abs(balanced / nc1(stats) - 1) > 1e-4  # it is another number


def test_the_second_pass_gives_a_value_to_what_moments_alone_cannot() -> None:
    feats_BD, labels_B = scattered(0, 100, 5, 12)
    stats = exact(feats_BD, labels_B, 5)
    first, second = summary(stats), second_look(feats_BD, labels_B, stats)
    assert first["nc1_balanced"] is None and "second pass" in first["reasons"]["nc1_balanced"]
    both = combined(first, second)
    assert both["nc1_balanced"] == second["nc1_balanced"] and "nc1_balanced" not in both["reasons"]
    assert both["nc4"] is None and both["reasons"]["nc4"] == "no classifier"
    assert {name for name, value in both.items() if value is None} == set(both["reasons"])


def test_empty_classes_take_no_part() -> None:
    feats_BD, labels_B = clusters(4, 16, 30, 1.0)
    numbers = torch.tensor([0, 1, 3, 4])  # 2 and 5 are without samples
    weight_KD, bias_K = randn(5, 6, 16) * 100, randn(6, 6)
    some, alone = exact(feats_BD, numbers[labels_B], 6), exact(feats_BD, labels_B, 4)
    assert ncc_hits(feats_BD, numbers[labels_B], some) == (120, 120)
    expected = nc4(feats_BD, alone, weight_KD[numbers], bias_K[numbers])
    assert nc4(feats_BD, some, weight_KD, bias_K) == expected
    found = second_look(feats_BD, numbers[labels_B], some, (weight_KD, bias_K))
    expected = second_look(feats_BD, labels_B, alone, (weight_KD[numbers], bias_K[numbers]))
    assert [found["nc1_per_class"][k] for k in numbers] == expected.pop("nc1_per_class")
    assert sum(value is None for value in found.pop("nc1_per_class")) == 2
    assert found == expected


def test_half_precision_features_and_autocast_change_no_nearest_centre() -> None:
    feats_BD, labels_B = crowded()
    feats_BD = (feats_BD - 1000).bfloat16()
    stats = exact(feats_BD, labels_B, 7)
    expected = nearest_centre(feats_BD.double(), stats)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_centre(feats_BD, stats), expected)


def test_wrong_shapes_and_labels_are_refused() -> None:
    feats_BD, labels_B = clusters(3, 4, 5, 1.0)
    stats = exact(feats_BD, labels_B, 3)
    with pytest.raises(ValueError, match=r"labels \(1,\)"):
        ncc_hits(feats_BD, labels_B[:1], stats)
    with pytest.raises(ValueError, match=r"features \(15, 3\): .* shape \(15, 4\)"):
        nearest_centre(feats_BD[:, :3], stats)
    with pytest.raises(ValueError, match="finite"):
        nearest_centre(feats_BD / 0, stats)
    second = SecondPass(stats)
    for labels in (labels_B[:1], labels_B - 1, labels_B + 1, labels_B.double()):
        with pytest.raises(ValueError, match="label"):
            second.update(feats_BD, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_are_taken(dtype: torch.dtype) -> None:
    feats_BD, labels_B = clusters(3, 4, 5, 1.0)
    stats = exact(feats_BD, labels_B, 3)
    assert second_look(feats_BD, labels_B.to(dtype), stats) == second_look(feats_BD, labels_B, stats)


def test_what_has_no_value_is_none_and_says_why() -> None:
    zeros_K = torch.zeros(3, dtype=torch.float64)
    empty = Statistics(zeros_K, torch.zeros(3, 4).double(), torch.zeros(4, 4).double(), zeros_K, torch.zeros(4))
    one = exact(randn(0, 5, 4), torch.full((5,), 2), 3)
    cases = [
        SecondPass(empty).metrics(lambda tensor: tensor),
        second_look(randn(0, 5, 4), torch.full((5,), 2), one),
    ]
    assert cases[0]["ncc_acc1"] is None and cases[0]["reasons"]["nc4"] == "no samples"
    for found in cases:
        assert found["nc1_per_class"] is found["nc1_balanced"] is None
        assert {name for name, value in found.items() if value is None} == set(found["reasons"])
