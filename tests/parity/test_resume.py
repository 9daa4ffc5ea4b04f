"""Killed and resumed is never seen: the same world size gives the same bits (architecture.md 6c)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import SMALL, curve, read_json, rows, said, started, torchrun, wait_for
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow

# 258 steps with clipping, a checkpoint each 40.
SETTINGS = ["engine.kind=deepspeed", "engine.zero=2", "engine.clip=1.2", "epochs=6", "save_every=40"]


def writer(workers: list[psutil.Process], file: Path) -> psutil.Process | None:
    """The process that has the file open: rank 0."""
    for process in workers:
        if any(opened.path == str(file) for opened in process.open_files()):
            return process
    return None


def assert_bitwise(out: Path, expected: Path) -> None:
    """The curves, what TensorBoard shows of them, and the exported weights."""
    for key in ("train/loss", "train/grad_norm", "nc/train_before/nc1", "nc/heldout_before/nc1"):
        assert curve(out, key) == curve(expected, key), key
    events = EventAccumulator(str(out / "tb")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(curve(expected))
    ours, theirs = (load_file(folder / "export/model.safetensors") for folder in (out, expected))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


def test_resume_after_kill_9_of_a_ray_worker_is_bitwise(ray_head: Any, tmp_path: Path) -> None:
    out, whole = tmp_path / "killed", tmp_path / "whole"
    log = tmp_path / "log"
    with started(log, "pretrain", SMALL, f"out={out}", *SETTINGS, env=ray_head.env) as driver:
        wait_for(lambda: (last := rows(out)[-1:]) and last[0]["step"] >= 50, 120, "50 steps", driver)
        victim = writer(ray_head.workers("ray::"), out / "metrics.jsonl")
        assert victim is not None, "no worker has metrics.jsonl open"
        victim.kill()
        killed_at, killed_time = rows(out)[-1]["step"], time.time()
        done = torchrun(2, "pretrain", SMALL, f"out={whole}", *SETTINGS)
        assert done.returncode == 0, said(done)
        assert driver.wait(150) == 0, log.read_text()[-6000:]

    resumed_from = max(row["step"] for row in rows(out) if row.get("time", killed_time) < killed_time)
    assert 40 <= resumed_from <= killed_at < 250 and resumed_from % 40 == 0, "from the newest checkpoint, not anew"
    assert read_json(out / "status.json")["state"] == "done"
    assert_bitwise(out, whole)
