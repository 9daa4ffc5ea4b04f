"""Losses of logits: against each formula written out for one sample in plain Python, and against other libraries."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import ROOT
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from nc_dist.errors import InputError
from nc_dist.losses import (
    BCE,
    MSE,
    CosineSoftmax,
    CrossEntropy,
    Focal,
    LabelSmoothing,
    LogitNorm,
    LogitPenalty,
    Loss,
    SquaredError,
)
from nc_dist.outputs import Outputs
from nc_dist.spec import validate

K = 5
RANDOM = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(7, K, dtype=torch.float64, generator=RANDOM)
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 4])
SHARES = torch.rand(7, K, dtype=torch.float64, generator=RANDOM)
SHARES = SHARES / SHARES.sum(1, keepdim=True)

Formula = Callable[[list[float], int], float]  # of one sample's logits and label


def outputs(logits: Tensor) -> Outputs:
    return Outputs(logits, logits, logits)


def minus_log_p(z: list[float], y: int) -> float:
    return math.log(sum(math.exp(other - z[y]) for other in z))


def smoothed(epsilon: float) -> Formula:
    """Of every class its share of the target, Szegedy et al. 2016."""
    return lambda z, y: sum(((1 - epsilon) * (k == y) + epsilon / len(z)) * minus_log_p(z, k) for k in range(len(z)))


def focal(gamma: float) -> Formula:
    return lambda z, y: (1 - math.exp(-minus_log_p(z, y))) ** gamma * minus_log_p(z, y)


def squared(kappa: float, M: float, factor: float) -> Formula:
    return lambda z, y: factor * sum(kappa * (z[k] - M) ** 2 if k == y else z[k] ** 2 for k in range(len(z)))


def binary(z: list[float], y: int) -> float:
    said = [1 / (1 + math.exp(-x)) for x in z]
    return -sum(math.log(p if k == y else 1 - p) for k, p in enumerate(said))


def length(z: list[float]) -> float:
    return math.sqrt(sum(x * x for x in z))


CASES: dict[str, tuple[Loss, Formula]] = {
    "ce": (CrossEntropy(), minus_log_p),
    "label_smoothing": (LabelSmoothing(), smoothed(0.1)),
    "label_smoothing 0.3": (LabelSmoothing(epsilon=0.3), smoothed(0.3)),
    "label_smoothing 0": (LabelSmoothing(epsilon=0), minus_log_p),
    "focal": (Focal(), focal(3)),
    "focal 0.5": (Focal(gamma=0.5), focal(0.5)),
    "focal 0": (Focal(gamma=0), minus_log_p),
    "mse": (MSE(), squared(1, 15, 1 / K)),
    "mse sum": (MSE(kappa=2, M=3, reduction="sum"), squared(2, 3, 1)),
    "squared_error": (SquaredError(), squared(9, 60, 10)),
    "squared_error 1": (SquaredError(kappa=2, M=3, scale=0.5), squared(2, 3, 0.5)),
    "bce": (BCE(), binary),
    "bce mean": (BCE(reduction="mean"), lambda z, y: binary(z, y) / K),
    "cosine_softmax": (CosineSoftmax(), lambda z, y: minus_log_p([x / 0.1 for x in z], y)),
    "logit_norm": (LogitNorm(), lambda z, y: minus_log_p([x / length(z) / 0.04 for x in z], y)),
    "logit_norm 1": (LogitNorm(temperature=1), lambda z, y: minus_log_p([x / length(z) for x in z], y)),
    "logit_penalty": (LogitPenalty(), lambda z, y: minus_log_p(z, y) + 6e-4 * length(z) ** 2 / 2),
    "logit_penalty 1": (LogitPenalty(beta=1), lambda z, y: minus_log_p(z, y) + length(z) ** 2 / 2),
}
each = pytest.mark.parametrize("name", CASES)


@each
def test_a_loss_of_labels_is_the_mean_of_its_formula(name: str) -> None:
    loss, formula = CASES[name]
    expected = sum(formula(z, y) for z, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True)) / 7
    assert float(loss(outputs(LOGITS), LABELS)) == pytest.approx(expected, rel=1e-12)


@each
def test_a_loss_of_probabilities_is_the_mean_over_the_classes_they_give(name: str) -> None:
    loss, formula = CASES[name]
    rows = zip(LOGITS.tolist(), SHARES.tolist(), strict=True)
    expected = sum(sum(t[y] * formula(z, y) for y in range(K)) for z, t in rows) / 7
    assert float(loss(outputs(LOGITS), SHARES)) == pytest.approx(expected, rel=1e-12)
    certain = loss(outputs(LOGITS), F.one_hot(LABELS, K).double())
    assert float(certain) == pytest.approx(float(loss(outputs(LOGITS), LABELS)), rel=1e-12)


@each
@pytest.mark.parametrize("targets", [LABELS, SHARES], ids=["labels", "probabilities"])
def test_the_gradient_is_that_of_the_value(name: str, targets: Tensor) -> None:
    leaf = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: CASES[name][0](outputs(logits), targets), leaf)


@each
@pytest.mark.parametrize("size", [1e4, 200.0, 1e-30, 0.0])
@pytest.mark.parametrize("targets", [LABELS, SHARES.float()], ids=["labels", "probabilities"])
def test_extreme_logits_have_a_finite_loss_and_gradient(name: str, size: float, targets: Tensor) -> None:
    """Some samples are right beyond doubt, some wrong beyond doubt; in single precision."""
    signs = torch.where(torch.arange(7) % 2 == 0, 1.0, -1.0)[:, None]
    leaf = (size * signs * F.one_hot(LABELS, K)).float().requires_grad_()
    value = CASES[name][0](outputs(leaf), targets)
    value.backward()
    assert value.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all()


def collapsed(a: float) -> float:
    """Cross-entropy where the logit of the own class is `a` and those of the others are 0."""
    return math.log1p((K - 1) * math.exp(-a))


CLOSED: dict[str, Callable[[float], float]] = {  # of such a sample
    "ce": collapsed,
    "label_smoothing": lambda a: collapsed(a) + 0.1 * a * (K - 1) / K,
    "focal": lambda a: (1 - math.exp(-collapsed(a))) ** 3 * collapsed(a),
    "mse": lambda a: (a - 15) ** 2 / K,
    "squared_error": lambda a: 90 * (a - 60) ** 2,
    "bce": lambda a: math.log1p(math.exp(-a)) + (K - 1) * math.log(2),
    "cosine_softmax": lambda a: collapsed(10 * a),
    "logit_norm": lambda a: collapsed(25 if a else 0),
    "logit_penalty": lambda a: collapsed(a) + 3e-4 * a * a,
}


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("height", [0.3, 20.0])
def test_a_half_collapsed_batch_has_the_value_in_closed_form(name: str, height: float) -> None:
    """Half of the samples have the logit `height` for their own class and 0 for the others, the rest all 0."""
    labels = torch.tensor([0, 1, 2, 3])
    logits = height * F.one_hot(labels, K).double()
    logits[2:] = 0
    expected = (CLOSED[name](height) + CLOSED[name](0)) / 2
    assert float(CASES[name][0](outputs(logits), labels)) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.0])
def test_focal_loss_of_two_classes_is_torchvisions_sigmoid_focal_loss(gamma: float) -> None:
    z, labels = LOGITS[:, 0], LABELS.clamp(max=1)
    logits = torch.stack([torch.zeros_like(z), z], 1)
    expected = sigmoid_focal_loss(z, labels.double(), alpha=-1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(Focal(gamma=gamma)(outputs(logits), labels), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [0.01, 0.5, 1.0])
def test_focal_gradients_are_finite_and_vanish_where_a_sample_is_certain(gamma: float) -> None:
    """The power below 1 of 1 - p has no slope at 0; p rounds to 1 from a logit of about 17 on in single precision."""
    for height in (10.0, 17.0, 30.0, 120.0):
        leaf = torch.tensor([[height, 0.0]]).requires_grad_()
        Focal(gamma=gamma)(outputs(leaf), torch.tensor([0])).backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().max() <= 2 * math.exp(-height)


def test_where_other_libraries_have_the_same_loss_the_values_agree() -> None:
    one_hot = F.one_hot(LABELS, K).double()
    pairs = [
        (CrossEntropy(), F.cross_entropy(LOGITS, LABELS)),
        (LabelSmoothing(epsilon=0.2), LabelSmoothingCrossEntropy(0.2)(LOGITS, LABELS)),
        (MSE(), F.mse_loss(LOGITS, 15 * one_hot)),
        (BCE(reduction="mean"), BinaryCrossEntropy(smoothing=0)(LOGITS, one_hot)),
    ]
    for loss, expected in pairs:
        torch.testing.assert_close(loss(outputs(LOGITS), LABELS), expected, rtol=1e-12, atol=0)


def test_logit_norm_does_not_see_the_length_of_logits() -> None:
    lengths = torch.arange(1, 8, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        LogitNorm()(outputs(LOGITS * lengths), LABELS), LogitNorm()(outputs(LOGITS), LABELS), rtol=1e-12, atol=0
    )


def test_the_loss_that_the_contributing_guide_shows_works() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], found)
    rows = zip(LOGITS.tolist(), LABELS.tolist(), strict=True)
    expected = sum((math.exp(-minus_log_p(z, k)) - (k == y)) ** 2 for z, y in rows for k in range(K)) / 7
    assert float(found["Brier"]()(outputs(LOGITS), LABELS)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (LabelSmoothing, "epsilon", 1),
        (LabelSmoothing, "epsilon", -0.1),
        (Focal, "gamma", -1),
        (MSE, "kappa", 0),
        (MSE, "reduction", "none"),
        (SquaredError, "scale", 0),
        (BCE, "reduction", "batch"),
        (CosineSoftmax, "temperature", 0),
        (LogitNorm, "temperature", -1),
        (LogitPenalty, "beta", -1),
    ],
)
def test_settings_without_a_meaning_are_refused(cls: type[Loss], key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{key}={value!r}"):
        validate(cls, {key: value}, "x")


def test_losses_of_logits_want_one_view_and_a_classifier_and_take_probabilities() -> None:
    for loss, _ in CASES.values():
        assert (loss.uses_logits, loss.views, loss.coupled, loss.soft, loss.paired) == (True, 1, False, True, False)
        assert loss.classifier == ("cosine" if loss.kind == "cosine_softmax" else None)
