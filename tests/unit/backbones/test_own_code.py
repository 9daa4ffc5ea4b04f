"""A net of the user's own: it runs only where that was allowed, is found from the working folder, and is one block."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from nc_dist import user_code
from nc_dist.backbones import OwnSpec
from nc_dist.data.augment import InputSpec
from nc_dist.errors import InputError
from nc_dist.model import Model, ModelSpec, check_input, export, load_exported

CODE = """
from pathlib import Path
import torch
from torch import nn
from nc_dist.backbones import SmallResNetSpec

Path("imported").touch()
not_callable = 3


class Net(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(3, dim, 3)
        self.norm = nn.BatchNorm2d(dim)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.5))

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def net(dim=6):
    return Net(dim)


def backbone():
    return SmallResNetSpec(name="resnet8", width=2).build()


def looks_at_values():
    net = Net(4)
    net.scale = float(net.conv.weight.detach().sum())
    return net


def maps():
    return nn.Conv2d(3, 4, 3)


def nothing():
    return 7


def broken():
    raise OSError("no such disk")
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a package of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(user_code.VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/nets.py").write_text(CODE)
    (tmp_path / "theirs/typo.py").write_text("def net(:")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "theirs"]:
        del sys.modules[name]


def spec(function: str = "net", **more: Any) -> OwnSpec:
    return OwnSpec(function=f"theirs.nets:{function}", **more)


def test_nothing_is_imported_unless_it_was_allowed(code: Path) -> None:
    with pytest.raises(InputError, match="function='theirs.nets:net': runs code .* --allow-user-code"):
        spec().build()
    with pytest.raises(InputError, match="--allow-user-code"):
        check_input(ModelSpec(backbone=spec()), InputSpec(size=32))
    assert not (code / "imported").exists() and "theirs" not in sys.modules


def test_an_export_that_names_code_is_not_opened_unless_it_was_allowed(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(user_code.VARIABLE, "1")
    model = Model(ModelSpec(backbone=spec(args={"dim": 4})), 3).eval()
    export(model, code / "export", InputSpec(size=16), ["a", "b", "c"], {})
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert load_exported(code).model.eval()(x).logits.equal(model(x).logits)
    monkeypatch.delenv(user_code.VARIABLE)
    del sys.modules["theirs.nets"]
    (code / "imported").unlink()
    with pytest.raises(InputError, match="--allow-user-code"):
        load_exported(code)
    assert not (code / "imported").exists()


def test_a_net_of_the_users_is_one_block_of_the_dimension_that_a_forward_shows(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(user_code.VARIABLE, "1")
    torch.manual_seed(3)
    model = Model(ModelSpec(backbone=spec(args={"dim": 9})), 4)
    assert model.dim == 9 and [(b.name, b.dim) for b in model.blocks] == [("whole", 9)]
    assert model.backbone.net.training and all(m.training for m in model.backbone.net.modules())
    norm = model.backbone.net.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d) and norm.num_batches_tracked == 0 and not norm.running_mean.any()  # type: ignore[union-attr]
    model.eval()
    x = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        assert model(x).features_Bd.equal(model.backbone.net(x))


def test_finding_the_dimension_draws_no_random_numbers(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(user_code.VARIABLE, "1")
    spec("backbone").build()
    torch.manual_seed(5)
    spec().build()
    after = torch.rand(3)
    torch.manual_seed(5)
    sys.modules["theirs.nets"].net()
    assert torch.rand(3).equal(after)


def test_a_backbone_of_the_users_keeps_its_blocks(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(user_code.VARIABLE, "1")
    built = spec("backbone").build()
    assert [block.name for block in built.blocks] == ["layer1.0", "layer2.0", "layer3.0"] and built.dim == 8
    assert check_input(ModelSpec(backbone=spec("backbone")), InputSpec(size=16)) == sum(
        p.numel() for p in built.parameters()
    )


def test_the_check_before_a_run_builds_and_runs_the_users_net_for_real(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(user_code.VARIABLE, "1")
    assert check_input(ModelSpec(backbone=spec("looks_at_values")), InputSpec(size=16), rows=4) == 140
    with pytest.raises(InputError, match="input.size=2: theirs.nets:net cannot"):
        check_input(ModelSpec(backbone=spec()), InputSpec(size=2))


@pytest.mark.parametrize(
    "function, args, said",
    [
        ("theirs.nets:net", {"colour": 1}, r"args=\{'colour': 1\}: TypeError"),
        ("theirs.nets:maps", {}, r"must map images to features \(B, d\), it gives \(1, 4, 30, 30\)"),
        ("theirs.nets:nothing", {}, "gives a int, not an nn.Module or a Backbone"),
        ("theirs.nets:broken", {}, "OSError: no such disk"),
        ("theirs.nets:not_callable", {}, "is a int, not a function"),
        ("theirs.nets:missing", {}, "cannot be imported from .*AttributeError"),
        ("theirs.other:net", {}, "cannot be imported from .*ModuleNotFoundError"),
        ("theirs.typo:net", {}, "cannot be imported from .*SyntaxError"),
    ],
)
def test_what_goes_wrong_in_the_users_code_is_told_with_its_name(
    function: str, args: dict[str, Any], said: str, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(user_code.VARIABLE, "1")
    with pytest.raises(InputError, match=f"model.backbone.function='{function}'.*{said}"):
        OwnSpec(function=function, args=args).build()


@pytest.mark.parametrize("function", ["net", "theirs/nets.py:net", "theirs.nets:net()", "theirs.nets:a.b", ":net"])
def test_a_function_is_named_by_module_and_name(function: str) -> None:
    with pytest.raises(ValidationError, match="function"):
        OwnSpec(function=function)


def test_a_run_file_can_name_a_function_and_tables_call_it_that() -> None:
    found = ModelSpec.model_validate({"backbone": {"kind": "own", "function": "a.b:c", "args": {"d": 1}}})
    assert found.backbone.name == "a.b:c" and "name" not in found.model_dump(mode="json")["backbone"]
