"""Configuration: what is refused and how it is said, overrides, and that a written run reads back equal."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nc_dist.config import FinetuneRun, MeasureRun, PretrainRun, SweepRun
from nc_dist.errors import InputError
from nc_dist.spec import Spec, dump, load, override, read_yaml, validate

Tree = dict[str, Any]

RUNS: list[tuple[type[Spec], Tree]] = [
    (
        PretrainRun,
        {
            "out": "o", "epochs": 0.5, "data": {"train": "digits", "augment": {"kind": "resized_crop_flip"}},
            "model": {"backbone": {"kind": "torchvision", "name": "vit_b_16"}, "head": {"kind": "mlp", "depth": 3}},
            "loss": {"kind": "supcon", "temperature": 0.07}, "optim": {"kind": "adamw", "betas": [0.8, 0.9]},
            "batch": {"global": 32, "micro": 8}, "engine": {"kind": "deepspeed", "zero": 3},
            "probe": {"per_class": None}, "launch": {"workers": 4, "gpus": 0.5},
        },
    ),
    (
        FinetuneRun,
        {
            "out": "o", "source": "runs/a", "data": {"train": "mnist5k", "shots": 5},
            "method": {"kind": "linear_probe", "l2": [1e-5, 1]}, "engine": {"kind": "torch", "precision": "fp64"},
        },
    ),
    (MeasureRun, {"out": "o", "model": "runs/a", "data": "digits", "blocks": ["layer1.0"], "split": "test"}),
    (MeasureRun, {"out": "o", "model": "runs/a", "data": "digits", "blocks": "all"}),
    (SweepRun, {"out": "o", "base": {"source": "a"}, "grid": {"seed": [0, 1], "method": [{"kind": "full"}]}}),
]  # fmt: skip


def refused(tree: Tree, *overrides: str, cls: type[Spec] = PretrainRun) -> str:
    with pytest.raises(InputError) as caught:
        validate(cls, override(tree, overrides), "run.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    "given, named, near, allowed",
    [
        ("sed=1", "sed=1", "seed", "out, seed, data"),
        (
            "optim.momentun=0.9",
            "optim.momentun=0.9",
            "momentum",
            "lr, weight_decay, decay_norm_and_bias, layer_decay, kind, momentum, nesterov",
        ),
        ("batch.globl=9", "batch.globl=9", "global", "global, micro"),
        ("model.backbone.widht=9", "model.backbone.widht=9", "width", "weights, kind, name, width"),
        ("data.augment={kind: crop_flip, padd: 1}", "data.augment.padd=1", "pad", "flip, then, kind, pad"),
    ],
)
def test_a_misspelt_key_names_the_nearest_and_those_allowed(
    tree: Tree, given: str, named: str, near: str, allowed: str
) -> None:
    message = refused(tree, given)
    assert f"run.yaml: {named}: unknown key; did you mean {near!r}? Allowed here: {allowed}" in message
    assert "1 error" in message


def test_a_key_near_to_none_is_refused_without_a_guess(tree: Tree) -> None:
    assert "zzz=1: unknown key. Allowed here: out, seed" in refused(tree, "zzz=1")


@pytest.mark.parametrize(
    "given, said",
    [
        ("optim.lr=fast", "optim.lr='fast': Input should be a valid number"),
        ("optim.lr=-1", "optim.lr=-1: Input should be greater than 0"),
        ("seed=1.5", "seed=1.5: Input should be a valid integer"),
        ("model.backbone.name=resnet9", "model.backbone.name='resnet9': Input should be 'resnet8'"),
        ("model.head=none", "model.head='none': Input should be"),
        ("model.head={depth: 2}", "model.head={'depth': 2}: needs a block with the key 'kind'"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_path(tree: Tree, given: str, said: str) -> None:
    assert f"run.yaml: {said}" in refused(tree, given)


def test_a_plain_union_is_named_by_its_key_alone() -> None:
    message = refused({"out": "o", "model": "m", "data": "d", "blocks": "al"}, cls=MeasureRun)
    assert "blocks='al'" in message and "blocks.l" not in message


@pytest.mark.parametrize(
    "given, said",
    [
        ("loss.kind=supconn", "loss.kind='supconn': unknown kind; did you mean 'supcon'? Allowed: ce, "),
        ("engine.kind=horovod", "engine.kind='horovod': unknown kind. Allowed: torch, deepspeed"),
        (
            "model.backbone.kind=resnet",
            "model.backbone.kind='resnet': unknown kind; did you mean 'small_resnet'? "
            "Allowed: small_resnet, torchvision, timm, own",
        ),
    ],
)
def test_an_unknown_kind_lists_the_kinds(tree: Tree, given: str, said: str) -> None:
    assert said in refused(tree, given)


def test_a_missing_key_is_named(tree: Tree) -> None:
    del tree["epochs"], tree["data"]["train"]
    message = refused(tree)
    assert "run.yaml: epochs: required key is missing" in message
    assert "run.yaml: data.train: required key is missing" in message


def test_all_errors_come_at_once_each_with_file_and_key(tree: Tree) -> None:
    message = refused(tree, "sed=1", "optim.lr=fast", "loss.kind=supconn", "model.backbone.widht=2", "batch.micro=0")
    heading, *lines = message.splitlines()
    assert heading == "run.yaml: 5 errors in the configuration"
    assert all(line.startswith("  run.yaml: ") for line in lines)
    keys = {line.split(": ")[1].split("=")[0] for line in lines}
    assert keys == {"sed", "optim.lr", "loss.kind", "model.backbone.widht", "batch.micro"}


@pytest.mark.parametrize(
    "text, said",
    [
        ("out: a\nseed: 1\nout: b\n", "the key 'out' is given twice"),
        ("optim:\n  lr: 1\n  lr: 2\n", "the key 'lr' is given twice"),
        ("out: [1, 2", "not valid YAML"),
        ("? [a, b]\n: 1\n", "not valid YAML"),
        ("- a\n- b\n", "expected keys and values, found list"),
        ("", "expected keys and values, found NoneType"),
    ],
)
def test_a_file_that_is_no_mapping_of_unique_keys_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="run.yaml") as caught:
        read_yaml(path)
    assert said in str(caught.value)


def test_a_missing_file_names_one_with_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "digits_ce.yaml").write_text("out: a")
    with pytest.raises(InputError, match=r"digit_ce.yaml: no such file; did you mean .*digits_ce.yaml\?"):
        read_yaml(tmp_path / "digit_ce.yaml")
    with pytest.raises(InputError, match=r"other.yaml: no such file$"):
        read_yaml(tmp_path / "other.yaml")


def test_another_kind_starts_its_block_anew_and_the_order_of_overrides_does_not_matter(tree: Tree) -> None:
    overrides = ["optim.betas=[0.8, 0.9]", "optim.kind=adamw", "optim.lr=2"]
    for given in (overrides, overrides[::-1]):
        assert override(tree, given)["optim"] == {"kind": "adamw", "betas": [0.8, 0.9], "lr": 2}


def test_the_same_kind_keeps_its_block(tree: Tree) -> None:
    assert override(tree, ["optim.kind=sgd", "optim.lr=2"])["optim"] == {"kind": "sgd", "lr": 2, "momentum": 0.5}


def test_override_leaves_the_given_tree_alone(tree: Tree) -> None:
    before = yaml.safe_dump(tree)
    override(tree, ["optim.lr=2", "loss.kind=supcon"])
    assert yaml.safe_dump(tree) == before


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim.lr=[1"])
def test_an_override_that_is_no_key_and_value_is_refused(tree: Tree, text: str) -> None:
    with pytest.raises(InputError, match="override"):
        override(tree, [text])


def test_1e_3_is_a_number_in_the_file_and_on_the_command_line(tree: Tree, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree).replace("'1e-3'", "1e-3"))
    assert isinstance(yaml.safe_load(path.read_text())["optim"]["lr"], str)  # YAML 1.1, the trap
    assert load(PretrainRun, path).optim.lr == 1e-3
    assert load(PretrainRun, path, ["optim.lr=5e-4"]).optim.lr == 5e-4


@pytest.mark.parametrize("cls, tree", RUNS, ids=[cls.__name__ for cls, _ in RUNS])
def test_a_written_run_reads_back_equal(cls: type[Spec], tree: Tree, tmp_path: Path) -> None:
    spec = validate(cls, tree, "run.yaml")
    (tmp_path / "run.yaml").write_text(dump(spec))
    assert load(cls, tmp_path / "run.yaml") == spec


def test_batch_global_is_written_and_read_by_its_alias(tree: Tree) -> None:
    run = validate(PretrainRun, override(tree, ["batch.global=256"]), "run.yaml")
    assert run.batch.global_ == 256
    assert yaml.safe_load(dump(run))["batch"] == {"global": 256, "micro": 64}


def test_a_spec_cannot_be_changed(tree: Tree) -> None:
    run = validate(PretrainRun, tree, "run.yaml")
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3  # type: ignore[misc]
