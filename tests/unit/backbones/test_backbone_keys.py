"""`model.backbone` in a run file: a block with its kind, or KIND:NAME."""

import pytest

from nc_dist.backbones import SmallResNetSpec, TimmSpec, TorchvisionSpec
from nc_dist.errors import InputError
from nc_dist.model import ModelSpec
from nc_dist.spec import Tree, override, validate


@pytest.mark.parametrize(
    "text, meant",
    [
        ("timm:test_vit", TimmSpec(name="test_vit")),
        ("torchvision:resnet18", TorchvisionSpec(name="resnet18")),
        ("small_resnet:resnet14", SmallResNetSpec(name="resnet14")),
    ],
)
def test_a_kind_and_a_name_are_a_whole_backbone_also_on_the_command_line(text: str, meant: object) -> None:
    tree: Tree = {"backbone": {"kind": "small_resnet", "name": "resnet8", "width": 4}}
    found = validate(ModelSpec, override(tree, [f"backbone={text}"]), "run.yaml")
    assert found.backbone == meant
    assert validate(ModelSpec, found.model_dump(mode="json"), "run.yaml") == found


@pytest.mark.parametrize(
    "block, said",
    [
        (
            "tim:x",
            "run.yaml: backbone='tim:x': expected a block with the key 'kind', small_resnet:NAME, torchvision:N",
        ),
        ("own:module.function", "expected a block"),
        ("torchvision:resnet19", "backbone='resnet19': unknown torchvision model; allowed are"),
        ({"kind": "tim", "name": "x"}, "backbone.kind='tim': unknown kind; did you mean 'timm'?"),
        ({"kind": "timm", "name": "x", "arg": 3}, "backbone.arg=3: unknown key; did you mean 'args'?"),
    ],
)
def test_a_wrong_backbone_is_told_with_what_there_is(block: object, said: str) -> None:
    with pytest.raises(InputError) as caught:
        validate(ModelSpec, {"backbone": block}, "run.yaml")
    assert said in str(caught.value)


def test_module_function_is_short_for_code_of_ones_own() -> None:
    from nc_dist.backbones import OwnSpec, spelled_out

    assert OwnSpec.model_validate(spelled_out("mynet.small:make")).function == "mynet.small:make"
