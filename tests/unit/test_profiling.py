"""The profiler records the steps that were asked for, whatever attempt takes them, and the others go on unrecorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import SMALL

from nc_dist.config import PretrainRun
from nc_dist.errors import InputError
from nc_dist.profiling import profiled, steps_of
from nc_dist.spec import load
from nc_dist.world import World


def steps(start: int, end: int) -> Iterator[int]:
    """Each step multiplies matrices of its own size."""
    for number in range(start + 1, end + 1):
        torch.ones(number, 7) @ torch.ones(7, number)
        yield number


def recorded(out: Path, rank: int = 0) -> list[int]:
    """The steps in the trace: the number of rows of each product."""
    trace = json.loads((out / f"profile/rank_{rank}.json").read_text())
    products = [event for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    return [event["args"]["Input Dims"][0][0] for event in products]


@pytest.mark.parametrize(
    ("start", "expected"), [(0, [4, 5, 6]), (3, [4, 5, 6]), (4, [5, 6]), (5, [6]), (6, None), (9, None)]
)
def test_the_steps_that_are_asked_for_are_in_the_trace(tmp_path: Path, start: int, expected: list[int] | None) -> None:
    taken = list(profiled(steps(start, 10), steps_of("4:7", 10), start, tmp_path, World(rank=2, size=3)))
    assert taken == list(range(start + 1, 11))
    if expected is None:
        assert list(tmp_path.iterdir()) == []
    else:
        assert recorded(tmp_path, rank=2) == expected


def test_a_run_that_ends_early_leaves_what_was_recorded(tmp_path: Path) -> None:
    for number in profiled(steps(0, 10), range(2, 9), 0, tmp_path, World()):
        if number == 4:
            break
    assert recorded(tmp_path) == [2, 3, 4]


def test_nothing_is_written_where_nothing_was_asked_for(tmp_path: Path) -> None:
    assert list(profiled(steps(0, 3), steps_of(None, 3), 0, tmp_path, World())) == [1, 2, 3]
    assert list(tmp_path.iterdir()) == []


def test_10_20_are_steps_in_a_run_file_and_on_the_command_line(tmp_path: Path) -> None:
    """YAML 1.1 would read a number in base 60."""
    assert load(PretrainRun, SMALL, ["profile.steps=10:20"]).profile.steps == "10:20"
    (tmp_path / "run.yaml").write_text(SMALL.read_text() + "profile: {steps: 10:20}\n")
    assert load(PretrainRun, tmp_path / "run.yaml").profile.steps == "10:20"


def test_steps_count_from_1_and_the_last_is_left_out() -> None:
    assert list(steps_of("10:20", 100)) == list(range(10, 20))
    assert list(steps_of("1:11", 10)) == list(range(1, 11))


@pytest.mark.parametrize("asked", ["0:3", "5:5", "7:3", "5:12", "11:12"])
def test_steps_that_the_run_has_not_are_refused(asked: str) -> None:
    with pytest.raises(InputError, match=f"profile.steps={asked}: .* of a run with steps 1 to 10"):
        steps_of(asked, 10)
