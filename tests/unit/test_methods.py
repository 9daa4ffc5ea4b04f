"""Fine-tuning methods: what each one trains, how much that is, and what SCL adds up."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from nc_dist.backbones import SmallResNetSpec, TorchvisionSpec, from_vit
from nc_dist.errors import InputError
from nc_dist.heads import MLPHead
from nc_dist.methods import SCLFT, Full, LayerFT, LinearProbe, MethodSpec
from nc_dist.methods.freezing import default_block, train_mode, trainable
from nc_dist.model import Model, ModelSpec

VIT_BLOCK = "encoder.layers.encoder_layer_1"


def source(family: str) -> Model:
    """A source model with a head, which transfer drops."""
    torch.manual_seed(0)
    if family == "vit":
        net = VisionTransformer(16, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.3)
        net.heads = nn.Identity()
        return Model(ModelSpec(backbone=SmallResNetSpec(), head=MLPHead()), 5, backbone=from_vit(net))
    backbone = SmallResNetSpec(name="resnet8", width=4) if family == "resnet8" else TorchvisionSpec(name=family)
    return Model(ModelSpec(backbone=backbone, head=MLPHead()), 5)


def trained(model: Model) -> set[str]:
    """Names of the parameters that require gradients, the net's own without our prefix."""
    return {name.removeprefix("backbone.net.") for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family, block", [("resnet8", "layer2.0"), ("resnet18", "layer3.0"), ("vit", VIT_BLOCK)])
@pytest.mark.parametrize("method", [LinearProbe(), LayerFT(), SCLFT(), Full()], ids=lambda m: m.kind)
def test_exactly_the_methods_parameters_are_trained(family: str, block: str, method: MethodSpec) -> None:
    model = method.apply(source(family), 7, seed=0)
    names = {name.removeprefix("backbone.net.") for name, _ in model.named_parameters()}
    classifier = {"classifier.weight", "classifier.bias"}
    expected = {
        "linear_probe": classifier,
        "layer_ft": classifier | {name for name in names if name.startswith(block + ".")},
        "scl_ft": classifier | {name for name in names if name.startswith(block + ".")},
        "full": names,
    }
    assert trained(model) == expected[method.kind]
    assert not any(name.startswith("head.") for name in names)
    assert model.classifier is not None and model.classifier.out_features == 7
    assert model.skip == (block if method.kind == "scl_ft" else None)


def test_a_method_after_another_on_the_same_source_trains_its_own_parameters_only() -> None:
    model = source("resnet8")
    LinearProbe().apply(model, 7, 0)
    assert len(trained(Full().apply(model, 7, 0))) > 20
    assert trained(LinearProbe().apply(model, 7, 0)) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("family, percent", [("resnet18", "8.27"), ("resnet50", "6.52")])
def test_one_block_of_a_published_net_is_as_much_as_the_paper_says(family: str, percent: str) -> None:
    """arXiv 2212.12206, layer fine-tuning of layer3.0 with 10 classes, the classifier counted in both."""
    for method in (LayerFT(), SCLFT()):
        some, whole = trainable(method.apply(source(family), 10, 0))
        assert f"{100 * some / whole:.2f}" == percent


@pytest.mark.parametrize("family, block", [("resnet8", "layer1.0"), ("vit", "encoder.layers.encoder_layer_2")])
def test_another_block_can_be_named(family: str, block: str) -> None:
    names = trained(LayerFT(block=block).apply(source(family), 3, 0))
    assert {name for name in names if not name.startswith("classifier")} and all(
        name.startswith((block + ".", "classifier.")) for name in names
    )


@pytest.mark.parametrize("method", [LayerFT(block="layer9"), SCLFT(block="layer9")], ids=lambda m: m.kind)
def test_an_unknown_block_lists_those_there_are(method: MethodSpec) -> None:
    with pytest.raises(InputError, match="method.block='layer9': no such block; .* layer1.0, layer2.0, layer3.0"):
        method.apply(source("resnet8"), 3, 0)


@pytest.mark.parametrize(
    "family, block", [("resnet18", "layer3.0"), ("resnet50", "layer3.0"), ("resnet8", "layer2.0"), ("vit", VIT_BLOCK)]
)
def test_the_default_block_is_fixed_for_each_family(family: str, block: str) -> None:
    assert default_block(source(family)) == block


@pytest.mark.parametrize("family, size", [("resnet8", 8), ("vit", 16)])
@torch.no_grad()
def test_the_scl_forward_is_the_classifier_of_last_plus_padded_block_features(family: str, size: int) -> None:
    plain = source(family).eval()
    x = torch.randn(3, 3, size, size)
    features, block = plain(x).features_Bd, default_block(plain)
    pooled = plain.features(x, [block])[block]
    model = SCLFT().apply(plain, 4, seed=0).eval()
    expected = features.clone()
    expected[:, : pooled.shape[1]] += pooled
    torch.testing.assert_close(model(x).features_Bd, expected)
    assert model.classifier is not None
    torch.testing.assert_close(model(x).logits_BK, model.classifier(expected))


def modes(model: Model) -> dict[str, bool]:
    return {name: m.training for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d | nn.Dropout)}


def test_frozen_batch_norm_keeps_the_sources_statistics_in_training() -> None:
    model = LayerFT().apply(source("resnet8"), 4, 0)
    model.eval()
    train_mode(model)
    assert {name for name, training in modes(model).items() if training} == {
        f"backbone.net.layer2.0.{name}" for name in ("bn1", "bn2", "downsample.1")
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(4, 3, 8, 8))
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved and all(name.startswith("backbone.net.layer2.0.") for name in moved)


def test_dropout_is_off_where_everything_is_frozen_and_on_in_the_trained_block() -> None:
    model = LayerFT().apply(source("vit"), 4, 0)
    train_mode(model)
    on = {name for name, training in modes(model).items() if training}
    inside = {name for name in modes(model) if name.startswith(f"backbone.net.{VIT_BLOCK}.")}
    frozen = {name for name in modes(model) if "encoder_layer_0" in name or "encoder_layer_2" in name}
    assert inside and inside <= on and not frozen & on


@pytest.mark.parametrize("method", [Full(), LinearProbe()], ids=lambda m: m.kind)
def test_the_train_mode_of_all_and_of_nothing_but_the_classifier(method: MethodSpec) -> None:
    model = method.apply(source("resnet8"), 4, 0)
    train_mode(model)
    assert set(modes(model).values()) == {method.kind == "full"}


def test_a_linear_probe_needs_a_strength() -> None:
    for wrong in ([], [-1.0], ["strong"]):
        with pytest.raises(ValueError, match="l2"):
            LinearProbe.model_validate({"l2": wrong})
    assert LinearProbe.model_validate({"l2": ["1e-5"]}).l2 == (1e-5,)


def test_the_new_classifier_follows_the_seed() -> None:
    weights: list[Any] = [Full().apply(source("resnet8"), 4, seed).classifier for seed in (0, 0, 1)]
    assert weights[0].weight.equal(weights[1].weight) and not weights[0].weight.equal(weights[2].weight)
