"""Bad input under torchrun: the checks of rank 0 end every rank with their exit code, and are told once."""

from __future__ import annotations

from pathlib import Path

import pytest
from elastic import ranks
from processes import SMALL, read_json, rows

pytestmark = pytest.mark.slow


def ended(folder: Path, *args: object) -> tuple[list[int], list[str]]:
    """Exit code and output of each of two ranks."""
    with ranks(folder, 2, *args) as group:
        codes = [process.wait(60) for process, _ in group]
    return codes, [log.read_text() for _, log in group]


def test_what_rank_0_finds_ends_all_ranks_with_exit_code_2_and_is_said_once(tmp_path: Path) -> None:
    command = ["pretrain", SMALL, f"out={tmp_path / 'run'}"]
    codes, (first, second) = ended(tmp_path, *command, f"data.train={tmp_path / 'nowhere'}")
    assert codes == [2, 2], first + second
    assert first.count("error: ") == 1 and "nowhere" in first and second == "", second
    assert not (tmp_path / "run").exists()


def test_a_finished_run_ends_all_ranks_with_exit_code_0_and_is_said_once(tmp_path: Path, finished_run: Path) -> None:
    codes, (first, second) = ended(tmp_path, "pretrain", finished_run / "run.yaml", f"out={finished_run}")
    assert codes == [0, 0] and "finished already" in first and second.count("finished") == 0, first + second
    assert read_json(finished_run / "status.json")["state"] == "done" and rows(finished_run)
