"""The front door: `ray job submit` of the small pre-train against a local head with token authentication."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from processes import cli, curve, read_json, run_command, said

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).with_name("ray"))
JOURNEY = [sys.executable, "-m", "nc_dist", "pretrain", "tests/small.yaml", "--on", "auto"]


def test_ray_job_submit_runs_the_small_pretrain_to_done(ray_head: Any, tmp_path: Path) -> None:
    settings = [f"out={tmp_path / 'run'}", "engine.kind=deepspeed", "engine.zero=2", "epochs=0.5"]
    submit = [RAY, "job", "submit", "--working-dir", ".", "--", *JOURNEY, *settings]
    done = run_command(submit, timeout=150, **ray_head.env)
    assert done.returncode == 0, said(done)
    assert "joined the Ray cluster" in done.stdout and "done in" in done.stdout and "succeeded" in done.stdout
    assert read_json(tmp_path / "run/status.json")["state"] == "done"
    result = read_json(tmp_path / "run/result.json")
    assert (result["world_size"], result["engine"]) == (2, "deepspeed zero-2")
    assert list(curve(tmp_path / "run")) == list(range(1, result["steps"] + 1))

    # The same once more: another driver finds it finished, and starts nothing.
    again = cli("pretrain", "tests/small.yaml", *settings, env=ray_head.env)
    assert again.returncode == 0 and "finished already" in again.stdout, said(again)


def test_a_job_may_not_write_into_ray_s_copy_of_the_working_directory(ray_head: Any) -> None:
    submit = [RAY, "job", "submit", "--working-dir", ".", "--", *JOURNEY, "out=runs/relative"]
    done = run_command(submit, timeout=90, **ray_head.env)
    assert done.returncode == 1, said(done)
    assert "needs an absolute path" in done.stdout and "failed" in done.stdout


def test_a_client_without_the_token_is_refused(ray_head: Any, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    env = {**ray_head.env, "RAY_AUTH_TOKEN_PATH": str(wrong)}
    done = run_command([RAY, "job", "list"], timeout=60, **env)
    assert done.returncode != 0 and "uthenticat" in done.stdout + done.stderr, said(done)
