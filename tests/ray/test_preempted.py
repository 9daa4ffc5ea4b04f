"""SIGTERM saves and stops with exit code 75; the same command goes on, and nobody can tell from the curve."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import FP64, SMALL, cli, curve, read_json, rows, said, started, wait_for


def stop_at(step: int, out: Path, log: Path, *args: object, env: dict[str, str] | None = None) -> int:
    """Run a command until it has made so many steps, send SIGTERM; the exit code."""
    with started(log, *args, env=env) as process:
        wait_for(lambda: (last := rows(out)[-1:]) and last[0]["step"] >= step, 120, f"{step} steps", process)
        process.send_signal(signal.SIGTERM)
        return process.wait(60)


def test_sigterm_here_saves_and_the_same_command_goes_on_bitwise(one_process: dict[str, Path], tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    command = ["pretrain", SMALL, f"out={out}", *FP64["ce"], "--on", "here"]
    assert stop_at(5, out, log, *command) == 75, log.read_text()
    status, stopped_at = read_json(out / "status.json"), rows(out)[-1]["step"]
    assert (status["state"], status["code"]) == ("preempted", 75) and "pretrain" in status["resume"]
    assert 5 <= stopped_at < 50 and f"step {stopped_at}" in status["reason"]
    assert (out / "checkpoints/last").resolve().name == f"step_{stopped_at}"
    assert "go on with the same command" in log.read_text()

    done = cli(*command)
    assert done.returncode == 0, said(done)
    assert curve(out) == curve(one_process["ce"])
    assert curve(out, "nc/train_before/nc1") == curve(one_process["ce"], "nc/train_before/nc1")
    assert read_json(out / "status.json")["state"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_all_processes_twice_saves_once_though_loader_workers_get_it_too(
    tmp_path: Path, number: signal.Signals
) -> None:
    """As schedulers send it; and torchrun passes it on to ranks that have it already."""
    out, log = tmp_path / "run", tmp_path / "log"
    command = ["pretrain", SMALL, f"out={out}", "epochs=100", "data.workers=2", "measure_every=10000", "--on", "here"]
    with started(log, *command) as process:
        wait_for(lambda: (last := rows(out)[-1:]) and last[0]["step"] >= 5, 120, "5 steps", process)
        for _ in range(2):
            os.killpg(process.pid, number)
        assert process.wait(60) == 75, log.read_text()
    assert (out / "checkpoints/last").resolve().name == f"step_{rows(out)[-1]['step']}"
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_a_stop_while_the_first_measure_is_made_takes_one_step_and_saves(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    with started(log, "pretrain", SMALL, f"out={out}", "probe.per_class=null", "--on", "here") as process:
        wait_for((out / "lease.json").exists, 90, "the first measure begins", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, log.read_text()
    assert [row["step"] for row in rows(out)] == [0, 1, 1] or [row["step"] for row in rows(out)] == [0, 1]
    assert (out / "checkpoints/last").resolve().name == "step_1"


@pytest.fixture
def ray_tmp() -> Iterator[Path]:
    """A short folder for the sessions of clusters that the command starts itself."""
    folder = Path(tempfile.mkdtemp(prefix="nc-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_sigterm_on_ray_saves_and_the_same_command_goes_on(ray_tmp: Path, tmp_path: Path) -> None:
    out, log, env = tmp_path / "run", tmp_path / "log", {"RAY_TMPDIR": str(ray_tmp)}
    command = ["pretrain", SMALL, f"out={out}", "epochs=6", "save_every=100", "--on", "ray"]
    assert stop_at(20, out, log, *command, env=env) == 75, log.read_text()
    stopped_at = rows(out)[-1]["step"]
    assert read_json(out / "status.json")["state"] == "preempted" and 20 <= stopped_at < 258
    assert (out / "checkpoints/last").resolve().name == f"step_{stopped_at}"

    done = cli(*command, timeout=150, env=env)
    assert done.returncode == 0, said(done)
    assert "started a Ray cluster on this machine" in done.stdout
    assert list(curve(out)) == list(range(1, 259))
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(ray_tmp) in " ".join(p.info["cmdline"] or [])]
    assert left == [], "processes of the private cluster are left"
