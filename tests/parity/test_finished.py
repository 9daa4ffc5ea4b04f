"""A finished run is never repeated: it ends with exit code 0 every time, and entered again it returns at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import SMALL, cli, files_of, read_json, said, torchrun

pytestmark = pytest.mark.slow

RUNS = 3  # by hand once 30 in a row: all 30 ended with 0
SETTINGS = ["engine.kind=deepspeed", "engine.zero=0"]


def test_runs_under_torchrun_with_zero_0_end_with_exit_code_0(tmp_path: Path) -> None:
    """Also `--fresh` on a folder that has a result: no rank may take the old one for the new one."""
    out = tmp_path / "run"
    for attempt in range(RUNS):
        done = torchrun(2, "pretrain", SMALL, f"out={out}", *SETTINGS, *(["--fresh"] if attempt else []))
        assert done.returncode == 0, said(done)
        assert "terminate called" not in done.stderr
        assert read_json(out / "result.json")["steps"] == 50
    assert len(list(tmp_path.iterdir())) == RUNS

    before = files_of(out)
    again = cli("pretrain", SMALL, f"out={out}", *SETTINGS)
    assert again.returncode == 0 and "finished already" in again.stdout, said(again)
    assert files_of(out) == before
