"""Losses against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nc_dist.losses import CrossEntropy, SupCon
from nc_dist.outputs import Outputs

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3])  # classes 2 and 3 come once
EMBEDDING = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def embedded(rows: Tensor) -> Outputs:
    return Outputs(rows, rows, None)


def supcon_by_hand(embedding: Tensor, labels: Tensor, tau: float) -> float:
    """Khosla et al. 2020, eq. 2 (L_out), sample by sample; the mean is over anchors that have a positive."""
    z = [row / row.norm() for row in embedding]
    terms = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if positives:
            below = sum(math.exp(float(z[i] @ z[a]) / tau) for a in others)
            logs = [math.log(math.exp(float(z[i] @ z[p]) / tau) / below) for p in positives]
            terms.append(-sum(logs) / len(positives))
    return sum(terms) / len(terms)


def test_cross_entropy_is_torchs() -> None:
    logits = torch.randn(7, 4)
    assert CrossEntropy()(Outputs(EMBEDDING, EMBEDDING, logits), LABELS).equal(F.cross_entropy(logits, LABELS))


@pytest.mark.parametrize("tau", [0.07, 0.1, 1.0])
def test_supcon_is_the_papers_formula(tau: float) -> None:
    value = SupCon(temperature=tau)(embedded(EMBEDDING), LABELS)
    assert float(value) == pytest.approx(supcon_by_hand(EMBEDDING, LABELS, tau), rel=1e-12)


def test_supcon_of_two_classes_that_are_collapsed_is_known() -> None:
    """Two antipodal points of two samples each: -log(e / (e + 2/e)) at temperature 1."""
    embedding = torch.tensor([[1.0, 0], [2, 0], [-1, 0], [-3, 0]], dtype=torch.float64)
    value = SupCon(temperature=1)(embedded(embedding), torch.tensor([0, 0, 1, 1]))
    assert float(value) == pytest.approx(math.log(1 + 2 * math.exp(-2)))


def test_supcon_does_not_depend_on_the_order_of_samples() -> None:
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    permuted = SupCon()(embedded(EMBEDDING[order]), LABELS[order])
    assert float(permuted) == pytest.approx(float(SupCon()(embedded(EMBEDDING), LABELS)), rel=1e-12)


def test_supcon_does_not_depend_on_the_length_of_embeddings() -> None:
    scaled = EMBEDDING * torch.arange(1, 8)[:, None]
    assert float(SupCon()(embedded(scaled), LABELS)) == pytest.approx(
        float(SupCon()(embedded(EMBEDDING), LABELS)), rel=1e-12
    )


def test_a_sample_without_a_positive_is_no_anchor_but_still_a_negative() -> None:
    with_single, without = SupCon()(embedded(EMBEDDING), LABELS), SupCon()(embedded(EMBEDDING[:6]), LABELS[:6])
    assert float(with_single) > float(without)  # one more term below the fraction of every anchor


@pytest.mark.parametrize("labels", [LABELS, torch.arange(7)], ids=["some classes once", "all classes once"])
def test_gradients_stay_finite_where_classes_come_once(labels: Tensor) -> None:
    leaf = EMBEDDING.clone().requires_grad_()
    value = SupCon()(embedded(leaf), labels)
    value.backward()
    assert value.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all()
    if len(set(labels.tolist())) == 7:
        assert not value.any() and not leaf.grad.any()


def test_what_a_loss_wants_of_the_model_and_the_data() -> None:
    assert (CrossEntropy.uses_logits, CrossEntropy.views, CrossEntropy.coupled) == (True, 1, False)
    assert (SupCon.uses_logits, SupCon.views, SupCon.coupled) == (False, 2, True)
