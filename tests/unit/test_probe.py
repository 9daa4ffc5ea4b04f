"""The linear probe against scikit-learn's logistic regression, and how it chooses its penalty."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from nc_dist.data.subset import stratified
from nc_dist.probe import VALIDATION_FRACTION, _solve, fit


def problem(n: int = 120, noise: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three overlapping classes of features with very different scales and means."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    feats = (random.normal(size=(3, 6))[labels] + noise * random.normal(size=(n, 6))) * 10.0 ** np.arange(-2, 4) + 5
    return torch.from_numpy(feats), torch.from_numpy(labels)


@pytest.mark.parametrize("l2", [0.02, 0.1, 1.0])
def test_the_fit_is_that_of_scikit_learn(l2: float) -> None:
    """Their C weighs the summed loss, our l2 the mean one: C = 1 / (N l2), on standardised features."""
    feats, labels = problem()
    mean, std = feats.mean(0), feats.std(0, correction=0)
    theirs = LogisticRegression(C=1 / (len(labels) * l2), solver="lbfgs", tol=1e-10, max_iter=5000)
    theirs.fit(((feats - mean) / std).numpy(), labels.numpy())
    weight, bias = _solve(feats, labels, 3, l2)
    np.testing.assert_allclose(weight * std, theirs.coef_, atol=1e-4)
    ours = torch.softmax(feats @ weight.T + bias, 1)
    np.testing.assert_allclose(ours, theirs.predict_proba(((feats - mean) / std).numpy()), atol=1e-4)


def test_the_fit_is_for_raw_features_of_any_precision() -> None:
    feats, labels = problem()
    found = fit(feats.float(), labels, 3, (0.1,), seed=0)
    weight, bias = _solve(feats.float().double(), labels, 3, 0.1)
    assert found.weight_KD.equal(weight) and found.bias_K.equal(bias)
    assert found.accuracy(feats.float(), labels) == float(
        ((feats @ weight.T + bias).argmax(1) == labels).double().mean()
    )


def test_a_constant_feature_gets_no_weight_and_does_no_harm() -> None:
    feats, labels = problem()
    constant = torch.cat([feats, torch.full((len(feats), 1), 0.1), torch.zeros(len(feats), 1)], 1)
    found, plain = fit(constant, labels, 3, (0.1,), 0), fit(feats, labels, 3, (0.1,), 0)
    assert not found.weight_KD[:, 6:].any() and found.weight_KD.isfinite().all()
    torch.testing.assert_close(found.weight_KD[:, :6], plain.weight_KD, rtol=1e-3, atol=1e-8)


def test_features_that_are_all_constant_predict_the_most_frequent_class() -> None:
    labels = torch.tensor([0] * 5 + [1] * 15)
    assert fit(torch.ones(20, 3), labels, 2, (0.1,), 0).accuracy(torch.ones(20, 3), labels) == 0.75


def test_the_penalty_is_chosen_on_the_validation_part() -> None:
    feats, labels = problem(n=150, noise=3.0)
    grid = (1e-4, 1e-2, 1e-1, 1.0, 30.0)
    rest, held = (torch.from_numpy(part) for part in stratified(labels.numpy(), VALIDATION_FRACTION, 3))
    scores = []
    for l2 in grid:
        weight, bias = _solve(feats[rest], labels[rest], 3, l2)
        scores.append(float(((feats[held] @ weight.T + bias).argmax(1) == labels[held]).double().mean()))
    found = fit(feats, labels, 3, grid, seed=3)
    best = max(scores)
    assert len(set(scores)) > 1, "a problem on which nothing depends on the penalty shows nothing"
    assert found.validation_accuracy == best
    assert found.l2 == max(l2 for l2, score in zip(grid, scores, strict=True) if score == best)


@pytest.mark.parametrize("grid, edge", [((1e-3, 1e-2), True), ((1e-3, 1e-2, 1e5), False), ((0.1,), False)])
def test_a_choice_at_the_edge_of_the_grid_is_flagged(grid: tuple[float, ...], edge: bool) -> None:
    """Separable, one class far more frequent: weak penalties are all right, an immense one knows that class only."""
    feats, labels = problem(noise=0.01)
    kept = (labels == 0) | (torch.arange(len(labels)) < 30)
    found = fit(feats[kept], labels[kept], 3, grid, 0)
    assert found.at_edge is edge and found.l2 == min(max(grid), 1e-2 if len(grid) > 1 else 0.1)


def test_a_class_that_never_comes_is_never_predicted() -> None:
    feats, labels = problem()
    found = fit(feats, labels, 5, (0.1,), 0)
    assert found.weight_KD.shape == (5, 6)
    assert (feats @ found.weight_KD.T + found.bias_K).argmax(1).max() < 3
