"""Classifiers: the simplex ETF, cosines, and that NC, exports, transfer and optimisers take all kinds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_dist.backbones import SmallResNetSpec
from nc_dist.data.augment import InputSpec
from nc_dist.errors import InputError
from nc_dist.heads import (
    ClassifierSpec,
    CosineClassifier,
    ETFClassifier,
    ETFHead,
    Linear,
    LinearClassifier,
    LinearHead,
    NoHead,
)
from nc_dist.heads.etf_classifier import simplex_etf
from nc_dist.methods import Full, LinearProbe
from nc_dist.methods.freezing import trainable
from nc_dist.model import Model, ModelSpec, classifier_of, export, load_exported
from nc_dist.optim import SGD, parameter_groups
from nc_dist.subject import open_subject

KINDS: list[ClassifierSpec] = [LinearClassifier(), ETFClassifier(seed=2), CosineClassifier(scale=7)]
SMALL = SmallResNetSpec(name="resnet8", width=2)


def small(classifier: ClassifierSpec, classes: int = 5) -> Model:
    torch.manual_seed(0)
    return Model(ModelSpec(backbone=SMALL, classifier=classifier), classes).eval()


@given(classes=st.integers(2, 12), more=st.integers(-1, 5), seed=st.integers(0, 2**63 - 1))
def test_a_simplex_etf_has_unit_rows_at_equal_angles_in_any_dimension_that_it_fits(
    classes: int, more: int, seed: int
) -> None:
    rows = simplex_etf(classes, classes + more, seed)
    expected = np.full((classes, classes), -1 / (classes - 1))
    np.fill_diagonal(expected, 1)
    assert rows.shape == (classes, classes + more) and rows.dtype == torch.float32
    np.testing.assert_allclose((rows @ rows.T).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(rows.sum(0).numpy(), 0, atol=1e-6)


def test_a_simplex_etf_is_of_its_seed_and_draws_no_other_random_numbers() -> None:
    state = torch.get_rng_state()
    one, same, other = (simplex_etf(4, 6, seed) for seed in (1, 1, 2))
    assert one.equal(same) and not torch.allclose(one, other) and torch.get_rng_state().equal(state)


@pytest.mark.parametrize("classes, dim, room", [(10, 9, True), (10, 8, False), (2, 1, True), (1, 4, False)])
def test_an_etf_classifier_needs_room_for_its_classes(classes: int, dim: int, room: bool) -> None:
    if room:
        assert ETFClassifier().build(dim, classes).weight.shape == (classes, dim)
    else:
        with pytest.raises(InputError, match=r"model.classifier.kind=etf.*set model.head.output .* higher, or model"):
            ETFClassifier().build(dim, classes)


def test_cosine_logits_are_scaled_cosines_of_angles() -> None:
    classifier = CosineClassifier(scale=10).build(2, 2)
    classifier.weight.data = torch.tensor([[3.0, 0], [1, 1]])
    logits = classifier(torch.tensor([[2.0, 0], [0, -5]]))
    torch.testing.assert_close(logits, torch.tensor([[10, 10 / 2**0.5], [0, -10 / 2**0.5]]))
    assert CosineClassifier().scale == 1


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.kind)
def test_the_effective_linear_map_chooses_as_the_classifier_does(spec: ClassifierSpec) -> None:
    classifier, h = spec.build(6, 5), torch.randn(200, 6)
    if isinstance(spec, CosineClassifier):
        classifier.weight.data *= torch.tensor([[0.1], [1], [10], [1], [1]])  # rows of other lengths choose otherwise
        assert not (h @ classifier.weight.T).argmax(1).equal(classifier(h).argmax(1))
    weight, bias = classifier.effective()
    assert weight.shape == (5, 6) and bias.shape == (5,) and (classifier.out_features, classifier.in_features) == (5, 6)
    assert (h @ weight.T + bias).argmax(1).equal(classifier(h).argmax(1))
    if not isinstance(spec, LinearClassifier):
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.kind)
def test_the_classifier_of_a_model_is_a_copy_of_that_map(spec: ClassifierSpec) -> None:
    model = small(spec).double()
    copy = classifier_of(model)
    assert model.classifier is not None and copy is not None
    before = model.classifier.weight.clone()
    for ours, theirs in zip(copy, model.classifier.effective(), strict=True):
        torch.testing.assert_close(ours, theirs.float())
        ours.zero_()
    assert model.classifier.weight.equal(before)


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.kind)
def test_every_kind_is_exported_read_back_and_opened_for_measuring(spec: ClassifierSpec, tmp_path: Path) -> None:
    model, x = small(spec), torch.randn(20, 3, 8, 8)
    export(model, tmp_path / "export", InputSpec(size=8), list("abcde"), {})
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config["model"]["classifier"] == spec.model_dump(mode="json")
    read, subject = load_exported(tmp_path).model.eval(), open_subject(str(tmp_path))
    with torch.no_grad():
        outputs, (seen, _) = model(x), subject.observe(x, [])
        assert read(x).logits_BK.equal(outputs.logits_BK) and seen.logits_BK is not None
        assert seen.logits_BK.equal(outputs.logits_BK)
    linear = subject.linear_map()
    assert linear is not None and linear[1] is not None and subject.class_names == tuple("abcde")
    assert (seen.embedding_BE @ linear[0].T + linear[1]).argmax(1).equal(seen.logits_BK.argmax(1))


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.kind)
def test_transfer_makes_a_linear_classifier_of_any(spec: ClassifierSpec) -> None:
    for method in (Full(), LinearProbe()):
        moved = method.apply(small(spec), 4, 0)
        assert isinstance(moved.classifier, Linear) and moved.spec.classifier == LinearClassifier()
        assert all(p.requires_grad for p in moved.classifier.parameters())


def test_a_fixed_classifier_and_head_are_neither_optimised_nor_counted() -> None:
    spec = ModelSpec(backbone=SMALL, head=ETFHead(hidden=9, output=8), classifier=ETFClassifier())
    model = Model(spec, 5)
    backbone = sum(p.numel() for p in model.backbone.parameters())
    grouped = [p for group in parameter_groups(model, model.block_prefixes, SGD()) for p in group["params"]]
    assert sum(p.numel() for p in grouped) == backbone and trainable(model) == (backbone, backbone)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = SGD(lr=0.1).build(parameter_groups(model, model.block_prefixes, SGD()))
    model(torch.randn(4, 3, 8, 8)).logits[:, 0].sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert {"classifier.weight", "head.first", "head.second"} <= before.keys()  # saved and exported, all the same
    assert "backbone.net.conv1.weight" in moved and not {name for name in moved if not name.startswith("backbone.")}


@pytest.mark.parametrize("head", [NoHead(), LinearHead(output=8), ETFHead(hidden=9, output=8)])
def test_a_subject_knows_whether_its_model_has_a_head_even_of_the_features_size(
    head: NoHead | LinearHead | ETFHead, tmp_path: Path
) -> None:
    export(Model(ModelSpec(backbone=SMALL, head=head), 5), tmp_path / "export", InputSpec(size=8), [], {})
    assert open_subject(str(tmp_path)).headless == isinstance(head, NoHead)
