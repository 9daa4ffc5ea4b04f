"""The lines a person sees: their text, and that they are read from the run's own files."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nc_dist import console
from nc_dist.console import duration, following, following_trials, progress_line, trial_line
from nc_dist.tracking import FILE

ROW: dict[str, Any] = {
    "step": 300, "steps": 2502, "steps_per_epoch": 1251, "time": 60.0, "train/loss": 2.4123, "train/acc1": 0.479,
    "train/lr": 0.4, "perf/images_per_second": 16123.0, "perf/data_wait_frac": 0.012,
}  # fmt: skip


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (41.6, "42s"), (59.6, "1m00"), (725, "12m05"), (3599.6, "1h00"), (11400, "3h10"), (90061, "25h01")],
)
def test_a_duration_is_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_progress_line_reads_as_people_know_it() -> None:
    first = {**ROW, "step": 200, "time": 10.0}
    line = progress_line(ROW, first, 3.21)
    assert line == "ep 1 [300/1251] loss 2.41 top1 47.9 nc1 3.21 | 16.1k img/s data 1% lr 0.4 eta 18m21"


def test_a_progress_line_says_only_what_is_known() -> None:
    row = {k: v for k, v in ROW.items() if k not in ("train/acc1", "perf/data_wait_frac")}
    row |= {"perf/images_per_second": 870.4}
    assert progress_line(row, row, None) == "ep 1 [300/1251] loss 2.41 | 870 img/s lr 0.4"


@pytest.mark.parametrize("step, place", [(1, "ep 1 [1/10]"), (10, "ep 1 [10/10]"), (11, "ep 2 [1/10]")])
def test_the_last_step_of_an_epoch_belongs_to_it(step: int, place: str) -> None:
    assert progress_line({**ROW, "step": step, "steps_per_epoch": 10}, ROW, None).startswith(place + " ")


def result(**changes: Any) -> dict[str, Any]:
    plain = {"variant": "ce", "dataset": "digits", "method": "full", "accuracy": 0.912, "nc1_downstream": 0.1234}
    return {**plain, "trainable_percent": 8.271, "seconds": 12.4, **changes}


def test_a_trial_is_one_line() -> None:
    assert trial_line(result()) == "ce digits full: accuracy 91.2 % nc1 0.123 trainable 8.27 % (12 s)"
    assert " nc1 - " in trial_line(result(nc1_downstream=None))


def write(path: Path, *added: dict[str, Any], mode: str = "a") -> None:
    with path.open(mode) as file:
        file.writelines(json.dumps(row) + "\n" for row in added)


def test_new_rows_are_shown_and_old_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "POLL_SECONDS", 0.01)
    write(tmp_path / FILE, {**ROW, "step": 1})
    with following(tmp_path):
        time.sleep(0.05)
        write(tmp_path / FILE, {"step": 2, "nc/train_before/nc1": 7.5}, {**ROW, "step": 2})
        time.sleep(0.05)
        write(tmp_path / FILE, {**ROW, "step": 3})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" loss")[0] for line in lines] == ["ep 1 [2/1251]", "ep 1 [3/1251]"]
    assert all("nc1 7.5" in line for line in lines)


def test_a_warning_about_a_place_is_shown_once_and_measuring_shows_how_far_it_is(tmp_path: Path) -> None:
    path = tmp_path / FILE
    lines = console._lines(path)
    assert next(lines) is None
    warned = {"step": 5, "warnings": ["heldout_after: n = 5 a class is too small: 41%", "train_after: NC1 is below"]}
    write(path, warned, {**warned, "step": 6}, {"step": 0, "measured": "model 2/3", "images": 50, "of": 200})
    assert [line for line in (next(lines) for _ in range(4)) if line] == [
        ("warning, NC of heldout_after: n = 5 a class is too small: 41%", 0.0),
        ("warning, NC of train_after: NC1 is below", 0.0),
        ("model 2/3: 50/200 images", 0.25),
    ]


def test_after_a_file_was_cut_back_for_a_resume_only_new_rows_are_shown(tmp_path: Path) -> None:
    path = tmp_path / FILE
    write(path, *({**ROW, "step": step} for step in (1, 2, 3)))
    lines = console._lines(path)
    assert next(lines) is None
    write(path, {**ROW, "step": 1}, mode="w")
    assert next(lines) is None  # the earlier attempt showed it
    write(path, {**ROW, "step": 2})
    shown = next(lines)
    assert shown is not None and shown[0].startswith("ep 1 [2/1251]") and next(lines) is None


def test_half_a_row_waits_for_its_other_half(tmp_path: Path) -> None:
    path, text = tmp_path / FILE, json.dumps(ROW)
    lines = console._lines(path)
    assert next(lines) is None
    path.write_text(text[:40])
    assert next(lines) is None
    path.write_text(text + "\n")
    assert next(lines) == (progress_line(ROW, ROW, None), 300 / 2502)


def test_trials_are_shown_as_they_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    with following_trials(folders):
        for folder in folders:
            folder.mkdir()
        (tmp_path / "b/result.json").write_text(json.dumps(result()))
    assert capsys.readouterr().out.splitlines() == [f"[1/2] {trial_line(result())}"]
