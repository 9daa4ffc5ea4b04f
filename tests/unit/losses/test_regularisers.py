"""Regularisers against their formulas, sample by sample, and where collapse makes them known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nc_dist.errors import InputError
from nc_dist.losses import FeatureNorm, KoLeo, Regulariser, WithinClass
from nc_dist.outputs import Outputs
from nc_dist.spec import validate

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3])  # classes 2 and 3 come once
FEATURES = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TERMS = {
    "koleo": KoLeo(weight=1),
    "koleo in the micro-batch": KoLeo(weight=1, gathered=False),
    "feature_norm": FeatureNorm(weight=1),
    "within_class": WithinClass(weight=-1),
    "within_class as they are": WithinClass(weight=1, normalise=False),
}
each = pytest.mark.parametrize("name", TERMS)


def featured(rows: Tensor) -> Outputs:
    """Features before the head; what comes after it is another matter."""
    return Outputs(rows, -7 * rows[:, :2], None)


def koleo_by_hand(features: Tensor, epsilon: float) -> float:
    """Of every sample, the smallest of its distances to all others."""
    rows = [row / np.linalg.norm(row) for row in features.numpy()]
    nearest = [min(math.dist(a, b) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)]
    return -sum(math.log(distance + epsilon) for distance in nearest) / len(rows)


def within_by_hand(features: Tensor, labels: Tensor, normalise: bool) -> float:
    """Of each class of two or more, the sum of squared distances from its mean; over the samples of these classes."""
    rows = features.numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalise else rows
    total, samples = 0.0, 0
    for k in set(labels.tolist()):
        members = [row for row, label in zip(rows, labels.tolist(), strict=True) if label == k]
        if len(members) > 1:
            total += len(members) * float(np.var(np.stack(members), axis=0).sum())
            samples += len(members)
    return total / samples


@pytest.mark.parametrize("epsilon", [1e-8, 0.5])
@pytest.mark.parametrize("gathered", [True, False])
def test_koleo_is_the_mean_log_distance_to_the_nearest_neighbour(epsilon: float, gathered: bool) -> None:
    value = KoLeo(weight=2, epsilon=epsilon, gathered=gathered)(featured(FEATURES), LABELS)
    assert float(value) == pytest.approx(koleo_by_hand(FEATURES, epsilon), rel=1e-12)


def test_koleo_of_a_simplex_is_known_and_no_other_arrangement_of_its_points_is_lower() -> None:
    """n points with all distances sqrt(2 n / (n-1)) are the optimal packing of the sphere in n - 1 dimensions."""
    n = 5
    simplex = torch.eye(n, dtype=torch.float64) - 1 / n
    value = float(KoLeo(weight=1)(featured(simplex), torch.arange(n)))
    assert value == pytest.approx(-math.log(math.sqrt(2 * n / (n - 1)) + 1e-8), rel=1e-12)
    for seed in range(20):
        moved = simplex + 0.3 * torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        moved = moved - moved.mean(1, keepdim=True)  # stays in the n - 1 dimensions
        assert float(KoLeo(weight=1)(featured(moved), torch.arange(n))) > value


def test_copies_of_a_sample_count_minus_log_epsilon_and_pull_at_nothing() -> None:
    """Half of the batch is collapsed on one point, the rest are at right angles to all others."""
    rows = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]].requires_grad_()
    value = KoLeo(weight=1)(featured(rows), LABELS[:4])
    value.backward()
    assert float(value.detach()) == pytest.approx(-(math.log(1e-8) + math.log(math.sqrt(2) + 1e-8)) / 2, rel=1e-12)
    assert rows.grad is not None and rows.grad.isfinite().all() and rows.grad.abs().max() < 1


def test_feature_norm_is_half_the_mean_squared_length() -> None:
    expected = sum(sum(x * x for x in row) for row in FEATURES.tolist()) / 14
    assert float(FeatureNorm(weight=3)(featured(FEATURES), LABELS)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalise", [True, False])
def test_within_class_is_the_pooled_variance_of_classes_that_have_one(normalise: bool) -> None:
    value = WithinClass(weight=1, normalise=normalise)(featured(FEATURES), LABELS)
    assert float(value) == pytest.approx(within_by_hand(FEATURES, LABELS, normalise), rel=1e-12)


def test_within_class_of_half_collapsed_classes_is_known() -> None:
    """Class 0 is one direction; the two samples of class 1 are at an angle of 2a: each at sin(a) from their mean."""
    a = 0.3
    rows = [[2.0, 0], [5, 0], [math.cos(a), math.sin(a)], [3 * math.cos(a), -3 * math.sin(a)]]
    value = WithinClass(weight=1)(featured(torch.tensor(rows, dtype=torch.float64)), torch.tensor([0, 0, 1, 1]))
    assert float(value) == pytest.approx(math.sin(a) ** 2 / 2, rel=1e-12)


def test_the_only_sample_of_a_class_is_left_out_and_pulls_at_nothing() -> None:
    leaf = FEATURES.clone().requires_grad_()
    WithinClass(weight=1)(featured(leaf), LABELS).backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum(1).gt(0).tolist() == [True, True, True, False, True, True, False]
    every = WithinClass(weight=1)(featured(leaf), torch.arange(7))
    assert float(every.detach()) == 0


@each
def test_the_gradient_is_that_of_the_value(name: str) -> None:
    leaf = FEATURES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: TERMS[name](featured(rows), LABELS), leaf)


@each
@pytest.mark.parametrize("size", [1e4, 1e-4, 0.0])
def test_extreme_features_have_a_finite_value_and_gradient(name: str, size: float) -> None:
    leaf = (size * FEATURES).float().requires_grad_()
    value = TERMS[name](featured(leaf), LABELS)
    value.backward()
    assert value.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all()


@each
def test_the_order_of_samples_does_not_matter(name: str) -> None:
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    permuted = TERMS[name](featured(FEATURES[order]), LABELS[order])
    assert float(permuted) == pytest.approx(float(TERMS[name](featured(FEATURES), LABELS)), rel=1e-12)


@each
def test_probabilities_are_taken_where_labels_do_not_matter_and_else_refused_with_the_remedy(name: str) -> None:
    term, shares = TERMS[name], F.one_hot(LABELS).double()
    assert term.soft == (term.kind != "within_class")
    if term.soft:
        assert term(featured(FEATURES), shares).equal(term(featured(FEATURES), LABELS))
        return
    with pytest.raises(InputError, match=r"^regularisers: kind='within_class'.*data\.mix\.kind=none"):
        term(featured(FEATURES), shares)


def test_what_they_want() -> None:
    assert {name: term.coupled for name, term in TERMS.items()} == {
        "koleo": True,
        "koleo in the micro-batch": False,
        "feature_norm": False,
        "within_class": True,
        "within_class as they are": True,
    }
    assert not any(term.uses_logits for term in TERMS.values())
    assert {term.kind for term in TERMS.values() if term.paired} == {"within_class"}


@pytest.mark.parametrize("cls", [KoLeo, FeatureNorm, WithinClass])
def test_a_weight_must_be_given(cls: type[Regulariser]) -> None:
    with pytest.raises(InputError, match="weight: required key is missing"):
        validate(cls, {}, "x")
