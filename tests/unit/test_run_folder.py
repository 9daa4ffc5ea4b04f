"""The folder of a run: taken up by the same configuration alone, moved aside by --fresh, and how a run stands."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nc_dist.config import PretrainRun
from nc_dist.errors import InputError
from nc_dist.run_folder import (
    STOP,
    check_same,
    environment,
    prepare,
    result_of,
    write_result,
    write_status,
    write_whole,
)
from nc_dist.spec import load, override, validate


def run(tree: dict[str, Any], out: Path, *overrides: str) -> PretrainRun:
    return validate(PretrainRun, {**override(tree, overrides), "out": str(out)}, "run.yaml")


def test_a_new_folder_holds_the_run_and_what_it_runs_on(tree: dict[str, Any], tmp_path: Path) -> None:
    spec = run(tree, tmp_path / "a/b")
    assert prepare(spec) == tmp_path / "a/b"
    assert load(PretrainRun, tmp_path / "a/b/run.yaml") == spec
    written = json.loads((tmp_path / "a/b/env.json").read_text())
    assert written["packages"]["torch"] and written["python"] and written["host"]
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["env.json", "run.yaml"]


def test_the_same_configuration_is_taken_up_wherever_it_is_placed(tree: dict[str, Any], tmp_path: Path) -> None:
    prepare(run(tree, tmp_path / "x"))
    (tmp_path / "x/metrics.jsonl").write_text("kept")
    prepare(run(tree, tmp_path / "x", "launch.workers=4", "data.workers=2", "log_every=1"))
    assert (tmp_path / "x/metrics.jsonl").read_text() == "kept"
    assert load(PretrainRun, tmp_path / "x/run.yaml").launch.workers == 4


def test_another_configuration_is_refused_with_its_differences(tree: dict[str, Any], tmp_path: Path) -> None:
    prepare(run(tree, tmp_path / "x"))
    before = (tmp_path / "x/run.yaml").read_text()
    other = run(tree, tmp_path / "x", "optim.lr=0.5", "seed=7", "launch.workers=2")
    for refuse in (prepare, lambda spec: check_same(spec, tmp_path / "x")):
        with pytest.raises(InputError, match="x: belongs to another configuration") as caught:
            refuse(other)
        assert "optim.lr: 0.001 -> 0.5" in str(caught.value) and "seed: 0 -> 7" in str(caught.value)
        assert "workers" not in str(caught.value) and "--fresh" in str(caught.value)
    assert (tmp_path / "x/run.yaml").read_text() == before


def test_fresh_moves_the_old_folder_aside_and_deletes_nothing(tree: dict[str, Any], tmp_path: Path) -> None:
    prepare(run(tree, tmp_path / "x"))
    (tmp_path / "x/result.json").write_text('{"accuracy": 1}')
    prepare(run(tree, tmp_path / "x", "seed=7"), fresh=True)
    (aside,) = [path for path in tmp_path.iterdir() if path.name != "x"]
    assert aside.name.startswith("x.2") and result_of(aside) == {"accuracy": 1}
    assert load(PretrainRun, aside / "run.yaml").seed == 0
    assert load(PretrainRun, tmp_path / "x/run.yaml").seed == 7 and result_of(tmp_path / "x") is None


def test_fresh_twice_in_a_second_keeps_all_three(tree: dict[str, Any], tmp_path: Path) -> None:
    for seed in range(3):
        prepare(run(tree, tmp_path / "x", f"seed={seed}"), fresh=True)
    seeds = {load(PretrainRun, path / "run.yaml").seed for path in tmp_path.iterdir()}
    assert seeds == {0, 1, 2}


def test_a_file_in_the_way_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="a file is in the way"):
        prepare(run(tree, tmp_path / "x"))
    with pytest.raises(InputError, match="cannot be made"):
        prepare(run(tree, tmp_path / "x/y"))


def test_an_earlier_request_to_stop_is_forgotten(tree: dict[str, Any], tmp_path: Path) -> None:
    prepare(run(tree, tmp_path / "x"))
    (tmp_path / "x" / STOP).touch()
    prepare(run(tree, tmp_path / "x"))
    assert not (tmp_path / "x" / STOP).exists()


def test_a_result_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    assert result_of(tmp_path) is None
    (tmp_path / "result.json").write_text('{"accuracy"')
    assert result_of(tmp_path) is None
    write_result(tmp_path, {"accuracy": 0.5})
    assert result_of(tmp_path) == {"accuracy": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_status_says_state_code_reason_and_how_to_go_on(tmp_path: Path) -> None:
    write_status(tmp_path, "preempted", 75, "stopped at step 3", "nc-dist pretrain a.yaml")
    status = json.loads((tmp_path / "status.json").read_text())
    assert {**status, "time": 0} == {
        "state": "preempted", "code": 75, "reason": "stopped at step 3", "resume": "nc-dist pretrain a.yaml",
        "time": 0, "pid": os.getpid(),
    }  # fmt: skip


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", "old")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


def test_the_environment_can_be_written_as_json() -> None:
    assert json.loads(json.dumps(environment()))["cpus"] >= 1
