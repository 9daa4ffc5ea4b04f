"""torchvision's families: every cut gives the same forward, and torchvision's own classes load what is exported."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from nc_dist.backbones import SmallResNetSpec, TorchvisionSpec, from_vit
from nc_dist.backbones.torchvision_nets import cut
from nc_dist.backbones.vit import small_patches
from nc_dist.data.augment import InputSpec
from nc_dist.errors import InputError
from nc_dist.methods import SCLFT, LayerFT
from nc_dist.methods.freezing import trainable
from nc_dist.model import Model, ModelSpec, check_input, export, load_exported

EXPORT_TOLERANCE = 1e-6


class Case(NamedTuple):
    """A net, how many blocks it has, and the features that leave them."""

    spec: dict[str, Any]
    size: int
    num_blocks: int
    dims: list[int]  # without repetition
    dim: int
    classifier: str  # in torchvision's net


def case(name: str, num_blocks: int, dims: list[int], dim: int, classifier: str, size: int = 32, **spec: Any) -> Any:
    slow = [pytest.mark.slow] if name.startswith(("wide", "vit")) else []
    what = Case({"name": name, **spec}, size, num_blocks, dims, dim, classifier)
    return pytest.param(what, marks=slow, id="-".join(map(str, what.spec.values())))


V2 = [16, 24, 32, 64, 96, 160, 320, 1280]
V3 = [16, 24, 40, 48, 96, 576]
STAGES = [96, 192, 384, 768]
CASES = [
    case("resnet18", 8, [64, 128, 256, 512], 512, "fc"),
    case("resnet18", 8, [64, 128, 256, 512], 512, "fc", stem="small"),
    case("resnext50_32x4d", 16, [256, 512, 1024, 2048], 2048, "fc"),
    case("wide_resnet50_2", 16, [256, 512, 1024, 2048], 2048, "fc"),
    case("mobilenet_v2", 18, V2, 1280, "classifier.1"),
    case("mobilenet_v2", 18, V2, 1280, "classifier.1", stem="small"),
    case("mobilenet_v3_small", 12, V3, 1024, "classifier.3"),
    case("mobilenet_v3_small", 12, V3, 1024, "classifier.3", stem="small"),
    case("convnext_tiny", 21, STAGES, 768, "classifier.2", drop_path=0.3),
    case("convnext_tiny", 21, STAGES, 768, "classifier.2", stem="small"),
    case("vit_b_16", 12, [768], 768, "heads.head", image_size=32),
    case("vit_b_16", 12, [768], 768, "heads.head", size=16, image_size=16, stem="small"),
]


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest) -> tuple[Case, Model, Tensor]:
    """A model in eval mode whose statistics and parameters are not those of a new one, and two images."""
    torch.manual_seed(0)
    case: Case = request.param
    model = Model(ModelSpec(backbone=TorchvisionSpec(**case.spec)), 5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "layer_scale" in name or name.startswith("classifier."):
            nn.init.uniform_(parameter, 0.1, 0.5)
    return case, model, torch.randn(2, 3, case.size, case.size)


@torch.no_grad()
def test_suffix_of_prefix_is_the_forward_at_every_block(built: tuple[Case, Model, Tensor]) -> None:
    case, model, x = built
    whole = model(x)
    assert len(model.blocks) == case.num_blocks and model.dim == case.dim
    assert list(dict.fromkeys(block.dim for block in model.blocks)) == case.dims
    for block in model.blocks[:: max(1, len(model.blocks) // 4)]:
        outputs = model.suffix(model.prefix(x, block.name), block.name)
        assert outputs.features_Bd.equal(whole.features_Bd) and outputs.logits.equal(whole.logits), block.name


@torch.no_grad()
def test_features_are_what_hooks_see_in_torchvisions_own_forward(built: tuple[Case, Model, Tensor]) -> None:
    case, model, x = built
    seen: dict[str, Tensor] = {}
    net = model.backbone.net
    hooks = [
        net.get_submodule(block.name).register_forward_hook(
            lambda module, inputs, out, name=block.name: seen.__setitem__(name, out.clone())
        )
        for block in model.blocks
    ]
    output = net(x)
    for hook in hooks:
        hook.remove()
    outputs, features = model.observe(x, [block.name for block in model.blocks])
    torch.testing.assert_close(outputs.features_Bd, output)  # the net's classifier is taken off
    for block in model.blocks:
        raw = seen[block.name]
        torch.testing.assert_close(features[block.name], raw[:, 0] if raw.ndim == 3 else raw.mean((2, 3)))
        assert features[block.name].shape == (2, block.dim)


def theirs(case: Case, num_classes: int) -> Any:
    """torchvision's own class; for a small stem changed as the docstrings of the stems say, and no more."""
    name, size = case.spec["name"], case.spec.get("image_size")
    if case.spec.get("stem") != "small":
        return torchvision.models.get_model(
            name, num_classes=num_classes, **({"image_size": size} if size else {})
        ).eval()
    if name.startswith("vit"):
        assert name == "vit_b_16"
        return VisionTransformer(size, 4, 12, 12, 768, 3072, num_classes=num_classes).eval()
    net: Any = torchvision.models.get_model(name, num_classes=num_classes).eval()
    if name.startswith("resnet"):
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    elif name.startswith("convnext"):
        net.features[0][0] = nn.Conv2d(3, 96, 2, 2)
    else:
        net.features[0][0].stride = (1, 1)
    return net


@torch.no_grad()
def test_torchvisions_own_class_loads_what_is_exported_and_gives_the_same(
    built: tuple[Case, Model, Tensor], tmp_path: Path
) -> None:
    case, model, x = built
    export(model, tmp_path / "export", InputSpec(size=case.size), [], {})
    net, bare = theirs(case, 5), theirs(case, 5)
    net.load_state_dict(load_file(tmp_path / "export/model.safetensors"), strict=True)
    bare.set_submodule(case.classifier, nn.Identity())
    bare.load_state_dict(load_file(tmp_path / "export/backbone.safetensors"), strict=True)
    ours = model(x)
    torch.testing.assert_close(bare(x), ours.features_Bd, rtol=0, atol=EXPORT_TOLERANCE)
    torch.testing.assert_close(net(x), ours.logits, rtol=EXPORT_TOLERANCE, atol=EXPORT_TOLERANCE)
    read = load_exported(tmp_path).model.eval()
    assert read(x).logits.equal(ours.logits)


@pytest.mark.parametrize(
    "name, size, at", [("resnet18", 32, 32), ("mobilenet_v2", 32, 32), ("convnext_tiny", 32, 16), ("vit_b_16", 32, 64)]
)
def test_a_small_stem_keeps_this_many_places_of_a_small_image(name: str, size: int, at: int) -> None:
    with torch.device("meta"):
        backbone = TorchvisionSpec(name=name, stem="small", image_size=size).build().eval()
        z = backbone.stem(torch.zeros(1, 3, size, size))
    assert (z.shape[1] - 1 if z.ndim == 3 else z.shape[2]) == at


def test_small_patches_take_every_pixel_and_start_as_torchvisions() -> None:
    torch.manual_seed(0)
    net = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=512, mlp_dim=8)
    small_patches(net, 16)
    net.heads = nn.Identity()
    backbone, x = from_vit(net), torch.randn(1, 3, 16, 16, requires_grad=True)
    backbone.stem(x).sum().backward()
    assert x.grad is not None and (x.grad != 0).all()
    fresh = VisionTransformer(16, 4, num_layers=1, num_heads=2, hidden_dim=512, mlp_dim=8)
    assert net.conv_proj.weight.shape == fresh.conv_proj.weight.shape and not net.conv_proj.bias.any()
    torch.testing.assert_close(net.conv_proj.weight.std(), fresh.conv_proj.weight.std(), rtol=0.03, atol=0)
    assert net.encoder.pos_embedding.shape == fresh.encoder.pos_embedding.shape


def test_the_stems_of_small_images_start_as_torchvision_starts_its_own() -> None:
    torch.manual_seed(0)
    resnet: Any = TorchvisionSpec(name="resnet18", stem="small").build().net
    torch.testing.assert_close(float(resnet.conv1.weight.detach().std()), (2 / (64 * 9)) ** 0.5, rtol=0.05, atol=0)
    convnext: Any = TorchvisionSpec(name="convnext_tiny", stem="small").build().net
    torch.testing.assert_close(float(convnext.features[0][0].weight.detach().std()), 0.02, rtol=0.05, atol=0)
    assert not convnext.features[0][0].bias.any()


def rates(spec: TorchvisionSpec) -> list[float]:
    """Of dropout or of stochastic depth, of all layers that have one."""
    with torch.device("meta"):
        net = spec.build().net
    found = [m.p for m in net.modules() if isinstance(m, nn.Dropout | torchvision.ops.StochasticDepth)]
    assert all(isinstance(rate, float) for rate in found)
    return found


def test_drop_path_grows_to_the_last_block_and_dropout_reaches_every_layer_that_has_one() -> None:
    depth = rates(TorchvisionSpec(name="convnext_tiny", drop_path=0.4))
    assert depth == pytest.approx([0.4 * i / 17 for i in range(18)])
    assert max(rates(TorchvisionSpec(name="convnext_tiny"))) == 0.1  # torchvision's own
    assert set(rates(TorchvisionSpec(name="convnext_tiny", drop_path=0.0))) == {0.0}
    assert 0.3 in rates(TorchvisionSpec(name="vit_b_16", dropout=0.3))
    assert rates(TorchvisionSpec(name="mobilenet_v2")) == [0.2] and rates(
        TorchvisionSpec(name="mobilenet_v2", dropout=0.5)
    ) == [0.5]


def test_drop_path_is_random_in_training_follows_the_seed_and_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    model = Model(ModelSpec(backbone=TorchvisionSpec(name="convnext_tiny", drop_path=0.9)), 2)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.ones_(parameter)
    x = torch.randn(2, 3, 32, 32)

    def features(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(x).features_Bd  # type: ignore[no-any-return]

    assert features(1).equal(features(1)) and not features(1).equal(features(2))
    model.eval()
    assert features(1).equal(features(2))


@pytest.mark.parametrize(
    "spec, said",
    [
        ({"name": "resnet19"}, "unknown torchvision model; allowed are .*convnext_tiny.*mobilenet_v2.*resnet18.*vit_b"),
        ({"name": "swin_t"}, "unknown torchvision model"),
        ({"name": "resnet18", "drop_path": 0.1}, r"drop_path=0.1: resnet18 has none, only convnext.. have"),
        ({"name": "convnext_tiny", "dropout": 0.1}, r"dropout=0.1: convnext_tiny has none, only mobilenet.., vit.."),
        ({"name": "convnext_tiny", "drop_path": 1.0}, "drop_path"),
        ({"name": "vit_b_16", "stem": "small", "image_size": 30}, "image_size=30: must be a multiple of 4"),
        ({"name": "resnet18", "stem": "tiny"}, "imagenet"),
    ],
)
def test_what_torchvision_does_not_have_is_refused_with_what_it_has(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TorchvisionSpec.model_validate(spec)


def test_a_vision_transformer_for_another_image_size_is_refused_before_anything_starts() -> None:
    with pytest.raises(InputError, match="input.size=48"):
        check_input(ModelSpec(backbone=TorchvisionSpec(name="vit_b_16", image_size=32)), InputSpec(size=48))
    with pytest.raises(InputError, match="input.size=33"):
        check_input(ModelSpec(backbone=TorchvisionSpec(name="vit_b_16", image_size=33)), InputSpec(size=33))


@pytest.mark.parametrize("name, block", [("mobilenet_v3_small", "features.7"), ("convnext_tiny", "features.5.2")])
def test_one_block_of_the_middle_is_tuned_where_none_is_named(name: str, block: str) -> None:
    source = Model(ModelSpec(backbone=TorchvisionSpec(name=name)), 5)
    for method in (LayerFT(), SCLFT()):
        model = method.apply(source, 3, seed=0)
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        inside = {
            f"backbone.net.{block}.{name}" for name, _ in model.backbone.net.get_submodule(block).named_parameters()
        }
        assert names == inside | {"classifier.weight", "classifier.bias"}
        assert trainable(model)[0] < trainable(model)[1] / 5


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "convnext_tiny"])
def test_parameters_are_grouped_by_the_block_they_are_in(name: str) -> None:
    with torch.device("meta"):
        model = Model(ModelSpec(backbone=TorchvisionSpec(name=name)), 5)
    inside = [p for prefix in model.block_prefixes for p, _ in model.named_parameters() if p.startswith(prefix + ".")]
    outside = {p.split(".")[2] for p, _ in model.named_parameters() if p not in inside and p.startswith("backbone")}
    assert len(inside) == len(set(inside)) and outside <= {"conv1", "bn1", "features", "classifier"}


def test_every_torchvision_name_of_the_families_can_be_cut() -> None:
    names = torchvision.models.list_models(
        torchvision.models, include=["resnet*", "resnext*", "wide_resnet*", "mobilenet*", "convnext*", "vit*"]
    )
    assert len(names) == 22
    with torch.device("meta"):
        for name in names:
            backbone = cut(torchvision.models.get_model(name)).eval()
            x = torch.zeros(1, 3, 224, 224)
            z = backbone.stem(x)
            for i, block in enumerate(backbone.blocks):
                z = backbone.run(i, z)
                assert backbone.pool(i, z).shape == (1, block.dim), (name, block)
            assert backbone.finish(z).shape == (1, backbone.dim), name


def test_the_small_resnets_take_weights_too_and_build_without_reading_them() -> None:
    spec = SmallResNetSpec(name="resnet8", width=2, weights="nowhere.pth")
    assert spec.build().dim == 8 and spec.tags() == []
    assert TorchvisionSpec(name="resnet18", weights=True).weights == "DEFAULT"  # type: ignore[arg-type]
    assert TorchvisionSpec(name="resnet18", weights="DEFAULT").build().dim == 512  # nothing is downloaded
