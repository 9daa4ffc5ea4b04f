"""A sweep through Ray Tune: trials side by side, failed ones again, finished ones never."""

from __future__ import annotations

import csv
import threading
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import cli, read_json, said

from nc_dist import sweep
from nc_dist.config import SweepRun
from nc_dist.spec import load

pytestmark = pytest.mark.slow


@pytest.fixture
def run_file(finished_run: Path, tmp_path: Path) -> Path:
    """Four trials: two methods, two seeds."""
    tree = {
        "out": str(tmp_path / "sweep"),
        "base": {
            "source": str(finished_run),
            "data": {"train": "digits", "shots": 20},
            "method": {"kind": "full"},
            "optim": {"kind": "sgd", "lr": 0.02},
            "batch": {"global": 32, "micro": 32},
            "epochs": 15,
        },
        "grid": {"method.kind": ["full", "layer_ft"], "seed": [0, 1]},
        "launch": {"cpus": 1, "retries": 1},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def obstruct(trial: sweep.Trial) -> Path:
    """A real fault: metrics.jsonl is a folder, so that the trial cannot write."""
    folder = trial.out / "metrics.jsonl"
    folder.mkdir(parents=True)
    return folder


def heal_after_failure(trial: sweep.Trial, obstacle: Path, done: threading.Event, seen: list[str]) -> None:
    while not done.wait(0.02):
        if (trial.out / "status.json").is_file() and (status := read_json(trial.out / "status.json"))["code"] == 1:
            seen.append(status["reason"])
            obstacle.rmdir()
            return


def overlap(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return bool(a["started"] < b["ended"] and b["started"] < a["ended"])


def test_trials_run_side_by_side_failed_ones_again_and_finished_ones_never(ray_head: Any, run_file: Path) -> None:
    trials = sweep.trials(load(SweepRun, run_file), "sweep")
    assert len(trials) == 4
    healed, broken, *_ = trials
    done, seen = threading.Event(), list[str]()
    healer = threading.Thread(target=heal_after_failure, args=(healed, obstruct(healed), done, seen))
    obstacle = obstruct(broken)
    healer.start()
    try:
        first = cli("sweep", run_file, timeout=150, env=ray_head.env)
    finally:
        done.set()
        healer.join()

    assert first.returncode == 1, said(first)
    assert "1 of 4 trials failed" in first.stderr and broken.id in first.stderr
    status = read_json(broken.out / "status.json")
    assert (status["state"], status["code"]) == ("failed", 1) and "IsADirectoryError" in status["reason"]
    assert len(seen) == 1 and "IsADirectoryError" in seen[0], "it failed once, and was tried again"
    finished = [trial for trial in trials if trial is not broken]
    results = {trial.id: read_json(trial.out / "result.json") for trial in finished}
    assert any(overlap(a, b) for a, b in combinations(results.values(), 2)), "two alive at the same time"
    assert all(read_json(trial.out / "status.json")["state"] == "done" for trial in finished)

    obstacle.rmdir()
    written = {trial.id: (trial.out / "result.json").stat().st_mtime_ns for trial in finished}
    second = cli("sweep", run_file, timeout=150, env=ray_head.env)
    assert second.returncode == 0, said(second)
    assert "3 of them finished already" in second.stdout
    assert written == {trial.id: (trial.out / "result.json").stat().st_mtime_ns for trial in finished}
    out = run_file.parent / "sweep"
    with (out / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    assert read_json(out / "status.json")["state"] == "done"
