"""timm's nets: the exact cuts equal timm's own forward, any other net runs whole, the rest is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from nc_dist.backbones import TimmSpec
from nc_dist.data.augment import InputSpec
from nc_dist.errors import InputError
from nc_dist.methods import SCLFT, Full, LayerFT
from nc_dist.methods.freezing import default_block
from nc_dist.model import Model, ModelSpec, check_input, export, load_exported
from nc_dist.optim import SGD, parameter_groups

CUT = {
    "test_vit": {"img_size": 32},  # class token
    "test_vit2": {"img_size": 32},  # average of the places, register tokens
    "test_vit3": {"img_size": 32},  # attention pooling
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2, "pre_norm": True, "global_pool": "avg"},
    "test_convnext": {"drop_path_rate": 0.2},
    "test_convnext3": {},
    "test_resnet": {},
    "seresnet18": {},
}
WHOLE = {"test_efficientnet": {}, "test_byobnet": {}, "deit_tiny_distilled_patch16_224": {"img_size": 32, "depth": 1}}


def made(name: str, **more: Any) -> Model:
    torch.manual_seed(0)
    model = Model(ModelSpec(backbone=TimmSpec(name=name, args={**CUT, **WHOLE}[name])), 5, **more)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", CUT)
def test_suffix_of_prefix_is_timms_own_forward_at_every_block(name: str) -> None:
    model, x = made(name), torch.randn(2, 3, 32, 32)
    whole, own = model(x), model.backbone.net(x)
    assert own.shape == (2, model.dim)
    torch.testing.assert_close(whole.features_Bd, own)
    assert len(model.blocks) > 1
    for block in model.blocks:
        assert model.suffix(model.prefix(x, block.name), block.name).logits.equal(whole.logits), block.name


@torch.no_grad()
@pytest.mark.parametrize("name", CUT)
def test_features_are_what_hooks_see_in_timms_own_forward(name: str) -> None:
    model, x = made(name), torch.randn(2, 3, 32, 32)
    net: Any = model.backbone.net
    seen: dict[str, Tensor] = {}
    for block in model.blocks:
        net.get_submodule(block.name).register_forward_hook(
            lambda module, inputs, out, name=block.name: seen.__setitem__(name, out.clone())
        )
    net(x)
    raw = dict(seen)
    features = model.features(x, [block.name for block in model.blocks])
    for block in model.blocks:
        z = raw[block.name]
        if z.ndim == 4:
            expected = z.mean((2, 3))
        else:
            expected = z[:, 0] if net.global_pool == "token" else z[:, net.num_prefix_tokens :].mean(1)
        torch.testing.assert_close(features[block.name], expected)
        assert features[block.name].shape == (2, block.dim)


def test_downsampling_layers_are_blocks_where_there_are_any() -> None:
    names = [block.name for block in made("test_convnext").blocks]
    assert names[:3] == ["stages.0.blocks.0", "stages.1.downsample", "stages.1.blocks.0"]


@torch.no_grad()
@pytest.mark.parametrize("name", WHOLE)
def test_any_other_net_runs_as_one_block_that_is_the_whole_of_it(name: str) -> None:
    model, x = made(name), torch.randn(2, 3, 32, 32)
    assert [block.name for block in model.blocks] == ["whole"] and default_block(model) == "whole"
    own = model.backbone.net(x)
    assert model(x).features_Bd.equal(own) and model.features(x, ["whole"])["whole"].equal(own)
    assert model.suffix(model.prefix(x, "whole"), "whole").logits.equal(model(x).logits)


def test_methods_that_tune_a_block_tune_all_of_a_net_that_is_one_block() -> None:
    for method in (LayerFT(), SCLFT()):
        model = method.apply(made("test_efficientnet"), 3, seed=0)
        assert all(p.requires_grad for p in model.parameters())
    groups = parameter_groups(Full().apply(made("test_efficientnet"), 3, 0), ["backbone.net"], SGD(layer_decay=0.5))
    assert made("test_efficientnet").block_prefixes == ["backbone.net"]
    assert {group["lr_scale"]: len(group["params"]) > 2 for group in groups} == {0.5: True, 1.0: False}


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_timms_own_class_loads_what_is_exported_and_gives_the_same(name: str, tmp_path: Path) -> None:
    model, x = made(name), torch.randn(2, 3, 32, 32)
    export(model, tmp_path / "export", InputSpec(size=32), [], {})
    net, bare = (timm.create_model(name, num_classes=k, **{**CUT, **WHOLE}[name]).eval() for k in (5, 0))
    net.load_state_dict(load_file(tmp_path / "export/model.safetensors"), strict=True)
    bare.load_state_dict(load_file(tmp_path / "export/backbone.safetensors"), strict=True)
    torch.testing.assert_close(net(x), model(x).logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bare(x), model(x).features_Bd, rtol=1e-6, atol=1e-6)
    assert load_exported(tmp_path).model.eval()(x).logits.equal(model(x).logits)


def test_drop_path_follows_the_seed_of_the_step_and_is_off_in_evaluation() -> None:
    spec = TimmSpec(name="test_convnext", args={"drop_path_rate": 0.5, "ls_init_value": 1.0})
    model, x = Model(ModelSpec(backbone=spec), 5), torch.randn(4, 3, 32, 32)

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
        ({"name": "resnet9000"}, r"model.backbone.name='resnet9000': timm has no such model"),
        ({"name": "hf-hub:someone/net"}, "timm has no such model"),
        (
            {"name": "test_resnet", "args": {"colour": 1}},
            r"cannot build it with args=\{'colour': 1\}: TypeError.*colour",
        ),
        ({"name": "test_vit", "args": {"img_size": "big"}}, "cannot build it with args"),
    ],
)
def test_what_timm_cannot_build_is_refused_before_anything_starts(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_input(ModelSpec(backbone=TimmSpec(**spec)), InputSpec(size=32))


def test_images_of_another_size_than_the_nets_are_refused() -> None:
    with pytest.raises(InputError, match="input.size=32: deit_tiny_patch16_224 cannot"):
        check_input(ModelSpec(backbone=TimmSpec(name="deit_tiny_patch16_224")), InputSpec(size=32))


@pytest.mark.parametrize("key", ["num_classes", "pretrained", "features_only", "checkpoint_path"])
def test_arguments_that_are_not_the_users_to_give_are_named(key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} cannot be given here"):
        TimmSpec(name="test_resnet", args={key: 1})


def test_without_timm_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"name='test_resnet': timm is not installed; pip install 'nc-dist\[timm\]'"):
        TimmSpec(name="test_resnet").build()


def test_published_tags_are_timms() -> None:
    assert TimmSpec(name="test_resnet").tags() == ["r160_in1k"]
    assert TimmSpec(name="test_resnet.r160_in1k").tags() == ["r160_in1k"]
