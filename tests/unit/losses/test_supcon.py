"""The supervised contrastive loss against its formula, sample by sample."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nc_dist.errors import InputError
from nc_dist.losses import SupCon
from nc_dist.losses.term import alone
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


@pytest.mark.parametrize("tau", [0.07, 0.1, 1.0])
def test_supcon_is_the_papers_formula(tau: float) -> None:
    value = SupCon(temperature=tau)(embedded(EMBEDDING), LABELS)
    assert float(value) == pytest.approx(supcon_by_hand(EMBEDDING, LABELS, tau), rel=1e-12)


def test_supcon_of_two_classes_that_are_collapsed_is_known() -> None:
    """Two antipodal points of two samples each: -log(e / (e + 2/e)) at temperature 1."""
    embedding = torch.tensor([[1.0, 0], [2, 0], [-1, 0], [-3, 0]], dtype=torch.float64)
    value = SupCon(temperature=1)(embedded(embedding), torch.tensor([0, 0, 1, 1]))
    assert float(value) == pytest.approx(math.log(1 + 2 * math.exp(-2)))


def test_supcon_of_a_half_collapsed_batch_is_known() -> None:
    """One class is a point, the two samples of the other are at right angles to it and to each other."""
    embedding = torch.tensor([[1.0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 3]], dtype=torch.float64)
    value = SupCon(temperature=1)(embedded(embedding), torch.tensor([0, 0, 1, 1]))
    assert float(value) == pytest.approx((math.log(1 + 2 / math.e) + math.log(3)) / 2)


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


def test_samples_without_a_positive_are_counted() -> None:
    assert SupCon.paired
    assert int(alone(LABELS)) == 2 and int(alone(torch.arange(7))) == 7
    assert int(alone(LABELS.repeat(2))) == 0  # each is the positive of its other view


@pytest.mark.parametrize("labels", [LABELS, torch.arange(7)], ids=["some classes once", "all classes once"])
def test_gradients_stay_finite_where_classes_come_once(labels: Tensor) -> None:
    leaf = EMBEDDING.clone().requires_grad_()
    value = SupCon()(embedded(leaf), labels)
    value.backward()
    assert value.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all()
    if len(set(labels.tolist())) == 7:
        assert not value.any() and not leaf.grad.any()


def test_the_gradient_is_that_of_the_value() -> None:
    leaf = EMBEDDING.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: SupCon()(embedded(rows), LABELS), leaf)


@pytest.mark.parametrize("size", [1e4, 1e-4, 0.0])
def test_extreme_embeddings_have_a_finite_loss_and_gradient(size: float) -> None:
    leaf = (size * EMBEDDING).float().requires_grad_()
    value = SupCon(temperature=1e-4)(embedded(leaf), LABELS)
    value.backward()
    assert value.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all()


def test_probabilities_are_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"^loss\.kind='supcon'.*data\.mix\.kind=none.*loss\.kind=ce"):
        SupCon()(embedded(EMBEDDING), F.one_hot(LABELS).double())


def test_what_it_wants_of_the_model_and_the_data() -> None:
    assert (SupCon.uses_logits, SupCon().views, SupCon().coupled, SupCon.soft) == (False, 2, True, False)
    assert SupCon(two_views=False).views == 1
