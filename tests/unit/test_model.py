"""The model: every cut gives the same forward, exported names are torchvision's, an export reads back bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from nc_dist.backbones import SmallResNet, SmallResNetSpec, TorchvisionSpec, from_vit
from nc_dist.data.augment import InputSpec
from nc_dist.errors import InputError
from nc_dist.heads import MLPHead, NoHead
from nc_dist.model import (
    Model,
    ModelSpec,
    add_padded,
    check_input,
    export,
    exported,
    load_exported,
    with_new_classifier,
)

SMALL = SmallResNetSpec(name="resnet8", width=4)
VIT = {"image_size": 16, "patch_size": 8, "num_layers": 3, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}


def small(**more: Any) -> Model:
    spec = ModelSpec(backbone=SMALL, head=more.pop("head", NoHead()))
    return Model(spec, more.pop("num_classes", 5), **more)


def vit(**more: Any) -> Model:
    """The only net here that a name does not give: torchvision's smallest has 86 million parameters."""
    net = VisionTransformer(**VIT)
    net.heads = nn.Identity()
    return small(backbone=from_vit(net), **more)


def torchvision_model(name: str, **more: Any) -> Model:
    return Model(ModelSpec(backbone=TorchvisionSpec(name=name), head=more.pop("head", NoHead())), 5, **more)


def resnet20(**more: Any) -> Model:
    return Model(ModelSpec(backbone=SmallResNetSpec(name="resnet20", width=3)), 5, **more)


FAMILIES: dict[str, tuple[Callable[..., Model], int]] = {
    "resnet8": (small, 8),
    "resnet8 with head": (lambda: small(head=MLPHead(output=6)), 8),
    "resnet8 with skip": (lambda: small(skip="layer2.0"), 8),
    "resnet8 with head and skip": (lambda: small(skip="layer1.0", head=MLPHead(depth=3, hidden=7, output=6)), 8),
    "resnet20": (resnet20, 9),
    "resnet18": (lambda: torchvision_model("resnet18"), 33),
    "resnet18 with head": (lambda: torchvision_model("resnet18", head=MLPHead()), 32),
    "resnet50": (lambda: torchvision_model("resnet50", skip="layer3.0"), 32),
    "vit": (vit, 16),
    "vit with head": (lambda: vit(head=MLPHead(output=6)), 16),
    "vit with skip": (lambda: vit(skip="encoder.layers.encoder_layer_1"), 16),
}


@pytest.fixture(scope="module", params=FAMILIES)
def cut(request: pytest.FixtureRequest) -> tuple[Model, torch.Tensor]:
    """A model in eval mode with statistics that are not those of a new one, and two images."""
    make, size = FAMILIES[request.param]
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval(), torch.randn(2, 3, size, size)


@torch.no_grad()
def test_suffix_of_prefix_is_the_forward_at_every_block(cut: tuple[Model, torch.Tensor]) -> None:
    model, x = cut
    whole = model(x)
    last = model.backbone.index(model.skip) if model.skip else len(model.blocks) - 1
    for block in model.blocks[: last + 1]:
        for part, expected in zip(model.suffix(model.prefix(x, block.name), block.name), whole, strict=True):
            assert part.equal(expected), block.name


@torch.no_grad()
def test_features_are_what_hooks_see_in_the_nets_own_forward(cut: tuple[Model, torch.Tensor]) -> None:
    model, x = cut
    net, seen = model.backbone.net, {}
    hooks = [
        net.get_submodule(block.name).register_forward_hook(
            lambda module, inputs, out, name=block.name: seen.__setitem__(name, out)
        )
        for block in model.blocks
    ]
    (model if isinstance(net, SmallResNet) else net)(x)  # the small family has no forward of its own
    for hook in hooks:
        hook.remove()
    names = [block.name for block in model.blocks]
    outputs, features = model.observe(x, names)
    assert list(features) == names
    for block in model.blocks:
        raw = seen[block.name]
        pooled = raw[:, 0] if block.pooling == "cls" else nn.functional.adaptive_avg_pool2d(raw, 1).flatten(1)
        torch.testing.assert_close(features[block.name], pooled)
        assert features[block.name].shape == (2, block.dim)
    assert outputs.features_Bd.shape == (2, model.dim) and outputs.embedding_BE.shape == (2, model.embedding_dim)
    assert list(model.features(x, names[:1])) == names[:1]


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if "skip" in name] + ["resnet50"])
def test_a_skip_adds_the_blocks_features_to_the_last_and_starts_before_any_cut(family: str) -> None:
    make, size = FAMILIES[family]
    model, x = make().eval(), torch.randn(2, 3, size, size)
    assert model.skip is not None
    last = model.backbone.finish(model.backbone.run(len(model.blocks) - 1, model.prefix(x, model.blocks[-1].name)))
    expected = add_padded(last, model.features(x, [model.skip])[model.skip])
    assert model(x).features_Bd.equal(expected) and not model(x).features_Bd.equal(last)
    with pytest.raises(AssertionError, match="skip starts before the cut"):
        model.suffix(model.prefix(x, model.blocks[-1].name), model.blocks[-1].name)


def test_add_padded_pads_the_shorter_one_at_its_end_on_either_side() -> None:
    long, short = torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 20]])
    for a, b in ((long, short), (short, long)):
        assert add_padded(a, b).tolist() == [[11, 22, 3]]
    assert add_padded(short, short).tolist() == [[20, 40]]


@pytest.mark.parametrize("name, published", [("resnet8", 75_290), ("resnet20", 269_722)])
def test_the_small_resnets_have_the_published_size(name: str, published: int) -> None:
    """He et al. 2015, table 6: 0.27 million for ResNet-20; our two shortcuts are 1x1 convolutions with BatchNorm."""
    model = Model(ModelSpec(backbone=SmallResNetSpec(name=name)), 10)
    shortcuts = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert sum(p.numel() for p in model.parameters()) == published + shortcuts
    assert [b.dim for b in model.blocks][:: len(model.blocks) // 3] == [16, 32, 64]
    assert len(model.blocks) * 2 + 2 == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_torchvision_resnet_loads_what_is_exported(name: str) -> None:
    ours, theirs = torchvision_model(name).eval(), torchvision.models.get_model(name, num_classes=5).eval()
    assert list(exported(ours)) == list(theirs.state_dict())
    theirs.load_state_dict(exported(ours), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).logits_BK, theirs(x))


def test_a_torchvision_transformer_loads_what_is_exported() -> None:
    ours, theirs = vit().eval(), VisionTransformer(**VIT, num_classes=5).eval()
    assert exported(ours).keys() == theirs.state_dict().keys()
    theirs.load_state_dict(exported(ours), strict=True)
    x = torch.randn(2, 3, 16, 16)
    nn.init.normal_(theirs.heads.head.weight)
    ours.classifier.load_state_dict(theirs.heads.head.state_dict())  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(ours(x).logits_BK, theirs(x))


def test_a_model_without_classifier_or_with_a_head_exports_no_more_than_it_has() -> None:
    assert not any(name.startswith("fc") for name in exported(small(num_classes=0)))
    names = exported(small(head=MLPHead()))
    assert {name for name in names if name.startswith("head.")} == {
        f"head.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda: small(),
        lambda: small(num_classes=0, head=MLPHead(output=6)),
        lambda: small(skip="layer2.0"),
        lambda: small(skip="layer1.0", head=MLPHead(depth=1)),
        lambda: torchvision_model("resnet18"),
    ],
    ids=["plain", "head only", "skip", "skip and head", "resnet18"],
)
def test_an_export_reads_back_bit_for_bit(make: Callable[[], Model], tmp_path: Path) -> None:
    model, input = make().eval(), InputSpec(size=8, mean=(0.1, 0.2, 0.3))
    export(model, tmp_path / "run/export", input, ["a", "b"], {"nc1_source": 0.5})
    for place in (tmp_path / "run", tmp_path / "run/export"):
        read = load_exported(place)
        assert read.input == input and read.config["class_names"] == ["a", "b"] and read.config["nc1_source"] == 0.5
        assert read.folder == tmp_path / "run/export"
        assert read.model.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert read.model.state_dict()[name].equal(value), name
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for ours, theirs in zip(model(x), read.model.eval()(x), strict=True):
            assert (ours is None and theirs is None) or ours.equal(theirs)


def test_the_exported_backbone_is_the_net_without_classifier_and_head(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export(small(head=MLPHead()), tmp_path / "export", InputSpec(), [], {})
    names = load_file(tmp_path / "export/backbone.safetensors").keys()
    assert "conv1.weight" in names and not any(name.startswith(("fc.", "head.")) for name in names)


def test_a_second_export_replaces_the_first_and_leaves_no_partial(tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = small()
        export(model, tmp_path / "export", InputSpec(), [], {})
    assert (
        load_exported(tmp_path).model.state_dict()["backbone.net.conv1.weight"].equal(model.backbone.net.conv1.weight)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_without_an_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no exported model .* finish the run first"):
        load_exported(tmp_path)


@pytest.mark.parametrize("damage", ["no json", "no model", "no tensors", "other width"])
def test_an_export_that_does_not_fit_itself_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "export"
    export(small(), folder, InputSpec(), [], {})
    config = json.loads((folder / "config.json").read_text())
    if damage == "no tensors":
        (folder / "model.safetensors").write_bytes(b"\0" * 20)
    elif damage == "no json":
        (folder / "config.json").write_text("{")
    else:
        if damage == "no model":
            del config["model"]
        else:
            config["model"]["backbone"]["width"] = 5
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="not a model that fits its config.json"):
        load_exported(tmp_path)


def test_published_weights_are_not_fetched_again_to_read_an_export(tmp_path: Path) -> None:
    """The description keeps their name; rebuilding the net does without them."""
    model = torchvision_model("resnet18")
    weights = TorchvisionSpec(name="resnet18", weights="IMAGENET1K_V1")
    model.spec = model.spec.model_copy(update={"backbone": weights})
    export(model, tmp_path / "export", InputSpec(), [], {})
    assert load_exported(tmp_path).config["model"]["backbone"]["weights"] == "IMAGENET1K_V1"


def check(model: dict[str, Any], classes: int = 5, rows: int = 2, size: int = 8) -> int:
    return check_input(ModelSpec.model_validate({"backbone": SMALL, **model}), InputSpec(size=size), classes, rows)


def test_the_check_counts_all_parameters_but_the_classifiers_and_allocates_none() -> None:
    assert check({}) == check({}, classes=0) == sum(p.numel() for p in small(num_classes=0).parameters())
    wide = {"kind": "mlp", "hidden": 10**6, "output": 10**6}  # 4 TB of weights
    assert check({"head": wide}, classes=10**6) == check({}) + 16 * 10**6 + 10**12 + 2 * 10**6
    assert check({"backbone": TorchvisionSpec(name="resnet18", weights="DEFAULT")}, size=32) == 11_176_512


@pytest.mark.parametrize(
    "model, more, error",
    [
        ({"backbone": {"kind": "torchvision", "name": "vit_b_16"}}, {"size": 32}, "input.size=32: vit_b_16 cannot be"),
        ({"backbone": {"kind": "torchvision", "name": "resnet18"}}, {"rows": 1}, "input.size=8: resnet18 .* 1 such"),
        ({"head": {"kind": "mlp", "output": 10**18}}, {}, "model.head.kind=mlp: .*Storage size"),
        (
            {"head": {"kind": "trex"}},
            {"rows": 1},
            "model.head.kind=trex: not for 1 rows .*more than 1 value per channel",
        ),
        ({"head": {"kind": "etf", "output": 15}}, {}, "model.head.output=15: .* set 16 or more"),
        ({}, {"classes": 10**18}, "model.classifier.kind=linear: not for 10+ classes"),
        ({"classifier": {"kind": "etf"}}, {"classes": 18}, "model.classifier.kind=etf: .* of 18 .* embedding has 16"),
    ],
)
def test_what_cannot_be_built_or_trained_is_refused_by_its_key(
    model: dict[str, Any], more: dict[str, Any], error: str
) -> None:
    with pytest.raises(InputError, match=error):
        check(model, **more)
    check({"head": {"kind": "mlp"}, "classifier": {"kind": "etf"}}, rows=1, classes=17)


def test_an_unknown_torchvision_name_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown torchvision model; allowed are .*resnet18.*resnext.*vit_b_16"):
        TorchvisionSpec(name="resnet19")


def test_an_unknown_block_lists_those_there_are() -> None:
    with pytest.raises(
        ValueError, match="block='layer9': no such block; this backbone has layer1.0, layer2.0, layer3.0"
    ):
        small().prefix(torch.zeros(1, 3, 8, 8), "layer9")


def test_a_new_classifier_is_seeded_and_takes_the_features_before_the_head() -> None:
    source = small(head=MLPHead(output=6))
    state = torch.get_rng_state()
    one, same, other = (with_new_classifier(source, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.get_rng_state().equal(state)
    assert one.classifier is not None and same.classifier is not None and other.classifier is not None
    assert one.classifier.weight.shape == (3, 16) and one.backbone is source.backbone
    assert one.classifier.weight.equal(same.classifier.weight)
    assert not one.classifier.weight.equal(other.classifier.weight)
