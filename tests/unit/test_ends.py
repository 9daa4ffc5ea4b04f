"""How ends are told: who writes the status, what a stop is, what goes once a result is there."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nc_dist.errors import InputError
from nc_dist.launch import lease, start, worker
from nc_dist.run_folder import STOP, appears, result_of, write_status
from nc_dist.world import World


def status_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "status.json").read_text())  # type: ignore[no-any-return]


def told_by_another(out: Path, reason: str) -> None:
    write_status(out, "bad_input", 2, reason)
    (out / "status.json").write_text(json.dumps(status_of(out) | {"pid": os.getpid() + 1}))


def test_a_hang_is_the_reason_unless_another_rank_has_told_one(tmp_path: Path) -> None:
    start._hung(tmp_path, "hang: rank 1")
    assert status_of(tmp_path)["reason"] == "hang: rank 1"
    told_by_another(tmp_path, "a file is gone")
    start._hung(tmp_path, "hang: rank 1")
    assert status_of(tmp_path)["reason"] == "a file is gone"


def test_who_finds_the_folder_held_leaves_the_status_of_the_run_that_holds_it(tmp_path: Path) -> None:
    write_status(tmp_path, "running", None)
    assert start._ended(lease.Held("out=x: another writes to it"), tmp_path) == 2
    assert status_of(tmp_path)["state"] == "running"
    assert start._ended(InputError("data.train=x: no"), tmp_path) == 2
    assert status_of(tmp_path)["state"] == "bad_input"


def test_a_signal_that_interrupts_the_handling_of_another_one_is_taken(tmp_path: Path) -> None:
    stop, asked = worker._stop_request(tmp_path, World()), list[bool]()

    def again() -> None:
        if not asked:
            asked.append(stop())
            os.kill(os.getpid(), signal.SIGUSR1)

    assert not stop()
    with worker.stopping_on_sigterm(also=again):
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [True] and stop() and len(worker._stop_asked) == 2
    assert not stop()
    assert not isinstance(worker._stop_asked, threading.Event), "its lock is not one that can be taken twice"
    (tmp_path / STOP).touch()
    assert stop()


def test_a_file_appears_once_it_is_there(tmp_path: Path) -> None:
    assert not appears(tmp_path / "no folder/x") and not appears(tmp_path / "x")
    (tmp_path / "x").touch()
    assert appears(tmp_path / "x")


def test_what_a_run_leaves_over_goes_only_when_its_result_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tune(run: Any, world: World, stop: Any, at: Any) -> dict[str, Any]:
        (tmp_path / "checkpoints/step_1").mkdir(parents=True, exist_ok=True)
        return {"accuracy": 1.0}

    def killed(out: Path, result: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    run = SimpleNamespace(out=str(tmp_path), launch=SimpleNamespace(cpus=1, hang_s=60))
    monkeypatch.setitem(worker.JOURNEYS, "finetune", worker.JOURNEYS["finetune"]._replace(run=tune))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(worker, "write_result", killed)
        worker.run_journey("finetune", run)
    assert (tmp_path / "checkpoints/step_1").is_dir() and result_of(tmp_path) is None
    worker.run_journey("finetune", run)
    assert not (tmp_path / "checkpoints").exists() and result_of(tmp_path) == {"accuracy": 1.0}
