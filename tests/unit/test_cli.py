"""The command line of shards, and that bad input of a journey is one clear error, exit code 2, and no folder."""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from processes import SMALL
from servers import http_server
from typer.testing import CliRunner, Result

from nc_dist.cli import app
from nc_dist.config import PretrainRun
from nc_dist.data import manifest
from nc_dist.launch.start import start
from nc_dist.source_set import open_source_set
from nc_dist.spec import override, validate


def nc_dist(*words: object) -> Result:
    return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(app, [str(word) for word in words])


def order(folder: Path | str, *words: object) -> list[dict[str, Any]]:
    result = nc_dist("shards", "order", folder, "--global-batch", 8, "--micro", 1, *words)
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "digits"
    result = nc_dist("shards", "build", "digits:train", folder, "--per-class", 7, "--samples-per-shard", 20)
    assert result.exit_code == 0, result.stderr
    *_, line, last = result.stdout.splitlines()
    assert line.startswith("shard 4/4: 70 of 70 samples, ") and line.endswith(" samples/s, 0s left")
    assert last == f"{folder}: 70 samples of 10 classes in 4 shards, identity {manifest.load(folder).identity()}"
    return folder


def test_built_shards_are_balanced_and_verify(digits: Path) -> None:
    assert sorted(manifest.load(digits).labels) == sorted([*range(10)] * 7)
    result = nc_dist("shards", "verify", digits)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [*(f"digits-{i:06d}.tar: ok" for i in range(4)), f"{digits}: 0 faults"]


def test_damage_is_told_by_verify_with_exit_code_1(built: Path) -> None:
    loaded = manifest.load(built)
    shard, samples = loaded.shards[0], loaded.samples
    data = bytearray((built / shard.name).read_bytes())
    data[samples.offsets[2] + 5] ^= 255
    (built / shard.name).write_bytes(data)
    result = nc_dist("shards", "verify", built)
    assert result.exit_code == 1
    assert "built-000000.tar: 3 faults" in result.stdout and result.stdout.endswith("3 faults\n")
    assert f"sample '{samples.key(2)}': damaged" in result.stderr


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_order_prints_one_object_a_step_and_the_ranks_together_have_the_same_batch(digits: Path, world: int) -> None:
    whole = order(digits, "--seed", 3, "--epoch", 2)
    assert [line["step"] for line in whole] == list(range(8)) and set(whole[0]) == {"step", "keys"}
    assert len({key for line in whole for key in line["keys"]}) == 64
    ranks = [order(digits, "--seed", 3, "--epoch", 2, "--world", world, "--rank", rank) for rank in range(world)]
    for step, lines in enumerate(zip(*ranks, strict=True)):
        assert [key for line in lines for key in line["keys"]] == whole[step]["keys"]


def test_order_prints_as_many_steps_as_are_asked_for(digits: Path) -> None:
    assert [line["step"] for line in order(digits, "--steps", 3)] == [0, 1, 2]
    assert len(order(digits, "--steps", 99)) == 8
    assert order(digits, "--seed", 1, "--steps", 1) != order(digits, "--seed", 2, "--steps", 1)


def test_the_largest_seeds_are_taken(digits: Path, tmp_path: Path) -> None:
    largest = 2**63 - 1
    assert len(order(digits, "--seed", largest, "--epoch", largest, "--holdout-per-class", 1)) == 7
    words = ("digits:train", tmp_path / "x", "--per-class", 1, "--seed", largest)
    assert nc_dist("shards", "build", *words).exit_code == 0


@pytest.mark.parametrize("held", [0, 2])
def test_the_keys_of_an_order_are_those_of_the_run_with_the_same_values(
    tree: dict[str, Any], digits: Path, tmp_path: Path, held: int
) -> None:
    given = [f"data.train={digits}", f"data.holdout_per_class={held}", "seed=5", "data.window=2", "data.lanes=8"]
    run = validate(PretrainRun, override(tree, [*given, "batch.global=8", "batch.micro=2"]), "run.yaml")
    data = open_source_set(run)
    options = ("--seed", 5, "--window", 2, "--lanes", 8, "--micro", 2, "--holdout-per-class", held, "--epoch", 1)
    lines = order(digits, *options)
    assert len(lines) == data.order.steps_per_epoch == (70 - 10 * held) // 8
    for line in lines:
        positions = data.train[data.order.step(1, line["step"]).flatten()]
        assert line["keys"] == [data.source.key(position) for position in positions]


def test_an_order_of_shards_at_a_url_is_that_of_their_folder(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NC_DIST_CACHE", str(tmp_path))
    with http_server(digits) as server:
        assert order(server.url, "--seed", 3) == order(digits, "--seed", 3)


ORDER = ("--global-batch", 8, "--micro", 2)


@pytest.mark.parametrize(
    "words, said",
    [
        (("order", "{digits}", *ORDER, "--micro", 3), "--micro 3: must divide --global-batch 8; possible: [1"),
        (("order", "{digits}", *ORDER, "--micro", 16), "--micro 16: must divide --global-batch 8"),
        (("order", "{digits}", *ORDER, "--lanes", 3), "--lanes 3: must be a multiple of the 4 micro-batches"),
        (("order", "{digits}", *ORDER, "--world", 3), "--world 3 does not divide the 4 micro-batches"),
        (("order", "{digits}", *ORDER, "--world", 2, "--rank", 2), "--rank 2: must be in 0..1"),
        (("order", "{digits}", "--global-batch", 80, "--micro", 80), "--global-batch 80: larger than"),
        (("order", "{tmp}", *ORDER), "no readable manifest"),
        (("order", "{digits}", *ORDER, "--holdout-per-class", 7), "--holdout-per-class: cannot take 7 samples"),
        (("order", "{digits}", *ORDER, "--seed", -1), "seed"),
        (("order", "{digits}", *ORDER, "--seed", 2**63), "seed"),
        (("order", "{digits}", *ORDER, "--epoch", 2**63), "epoch"),
        (("build", "digits", "{tmp}/x", "--seed", 2**63), "seed"),
        (("order", "{digits}", *ORDER, "--window", 0), "window"),
        (("verify", "{tmp}"), "no readable manifest"),
        (("build", "digts", "{tmp}/x"), "did you mean 'digits'"),
        (("build", "digits:valid", "{tmp}/x"), "no such split"),
        (("build", "digits", "{digits}"), "holds shards of another recipe"),
        (("build", "digits", "{tmp}/x", "--per-class", 0), "per-class"),
        (("build", "digits", "{tmp}/x", "--samples-per-shard", 0), "samples-per-shard"),
    ],
)  # fmt: skip
def test_bad_input_of_a_shards_command_is_one_error_and_exit_code_2(
    words: tuple[object, ...], said: str, digits: Path, tmp_path: Path
) -> None:
    result = nc_dist("shards", *(str(word).format(digits=digits, tmp=tmp_path) for word in words))
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["optim.momentun=1"], "did you mean 'momentum'"),
        (["optim.lr=fast"], "optim.lr='fast'"),
        (["loss.kind=tripplet"], "Allowed: ce, "),
        (["data.train=digts"], "did you mean 'digits'"),
        (["data.train={tmp}"], "neither manifest.json nor one folder a class"),
        (["batch.micro=48"], "batch.micro=48: must divide batch.global=128"),
        (["batch.micro=256"], "batch.micro=256: must divide batch.global=128"),
        (["data.lanes=3"], "lanes=3: must be a multiple"),
        (["data.holdout_per_class=1000"], "data.holdout_per_class: cannot take 1000 samples of class"),
        (["batch.global=4096"], "larger than the training set"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "run"])
def test_bad_input_of_a_run_is_one_error_and_exit_code_2_before_anything_starts(
    tree: dict[str, Any],
    tmp_path: Path,
    overrides: list[str],
    said: str,
    dry_run: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**tree, "out": str(tmp_path / "out")}))
    given = [text.format(tmp=tmp_path) for text in overrides]
    assert start("pretrain", file, given, "here", dry_run, None, False) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and said in printed.err and printed.err.count("error: ") == 1
    assert os.listdir(tmp_path) == ["run.yaml"]


def test_a_missing_run_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("pretrain", tmp_path / "none.yaml", [], "here", True, None, False) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_makes_nothing(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**tree, "out": str(tmp_path / "out")}))
    assert start("pretrain", file, ["epochs=2"], "here", True, "other", False) == 0
    plan = capsys.readouterr().out
    assert f"{tmp_path}/other" in plan and "gradient_clipping" in plan
    assert [line.split()[-1] for line in plan.splitlines() if line.startswith("  steps  ")] == ["18"]
    assert os.listdir(tmp_path) == ["run.yaml"]


@pytest.mark.parametrize("words", [("pretrain", "x.yaml", "--on", "moon"), ("nonsense",), ("pretrain",)])
def test_a_wrong_command_line_is_exit_code_2(words: tuple[str, ...]) -> None:
    result = nc_dist(*words)
    assert result.exit_code == 2 and result.stderr


def test_help_answers_without_loading_torch() -> None:
    import subprocess
    import sys

    code = "import sys, nc_dist.cli; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'numpy', 'webdataset')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_schema_of_a_run_file_has_every_kind_of_loss_and_accepts_what_the_run_files_say() -> None:
    printed = CliRunner().invoke(app, ["schema", "pretrain"])
    tree = json.loads(printed.output)
    assert printed.exit_code == 0 and {"MSE", "SupCon", "KoLeo", "ETFClassifier"} <= tree["$defs"].keys()
    run = validate(PretrainRun, yaml.safe_load(SMALL.read_text()), "small").model_dump(mode="json", by_alias=True)
    jsonschema.validate(run, tree)
    with pytest.raises(jsonschema.ValidationError, match="nonsense"):
        jsonschema.validate(run | {"nonsense": 1}, tree)
    assert CliRunner().invoke(app, ["schema", "pretrian"]).exit_code == 2
