"""Sizes of elastic groups, following a file, and what of a row becomes a gauge."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nc_dist.config import Launch, Workers
from nc_dist.errors import InputError
from nc_dist.launch.sizes import allowed_sizes, size_of
from nc_dist.launch.tail import following, note
from nc_dist.spec import validate


@given(low=st.integers(1, 20), more=st.integers(0, 20), micro=st.integers(1, 64))
def test_allowed_sizes_share_a_step_s_micro_batches_evenly(low: int, more: int, micro: int) -> None:
    workers = Workers(min=low, max=low + more)
    expected = [size for size in range(low, low + more + 1) if micro % size == 0]
    if expected:
        assert allowed_sizes(workers, micro) == expected
    else:
        with pytest.raises(InputError, match=rf"min: {low}, max: {low + more}.* the {micro} micro-batches .*possible"):
            allowed_sizes(workers, micro)
    assert allowed_sizes(workers, None) == list(range(low, low + more + 1))
    assert allowed_sizes(low, micro) == [low], "a fixed number is checked where it is used"


def test_surplus_workers_are_left_over() -> None:
    assert [size_of(started, [1, 2, 4]) for started in range(1, 6)] == [1, 2, 2, 4, 4]


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(InputError, match="min must not be larger"):
        allowed_sizes(Workers(min=3, max=2), 4)


def test_workers_are_a_number_or_bounds() -> None:
    assert validate(Launch, {"workers": 3}, "x").workers == 3
    assert validate(Launch, {"workers": {"min": 1, "max": 4}}, "x").workers == Workers(min=1, max=4)
    for wrong in (0, "many", {"min": 0, "max": 2}, {"min": 1}, {"min": 1, "max": 2, "most": 3}):
        with pytest.raises(InputError, match="workers"):
            validate(Launch, {"workers": wrong}, "x")


def test_a_file_is_followed_from_where_it_ends_to_its_last_whole_line(tmp_path: Path) -> None:
    path, seen = tmp_path / "notices.txt", list[str]()
    path.write_text("before\n")
    with following(path, seen.append):
        note(tmp_path, "one")
        with path.open("a") as file:
            file.write("half")
            file.flush()
            time.sleep(0.7)
            file.write(" two\ncut")
    assert len(seen) == 2 and seen[0].endswith(" one") and seen[1] == "half two"


def test_a_notice_that_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note(tmp_path / "gone", "the disk is full")
    assert capsys.readouterr().out == "the disk is full\n"


def test_a_file_that_is_cut_back_is_followed_from_its_new_end(tmp_path: Path) -> None:
    path, seen = tmp_path / "metrics.jsonl", list[str]()
    path.write_text("a\nb\nc\n")
    with following(path, seen.append):
        path.write_text("a\n")
        time.sleep(0.7)
        with path.open("a") as file:
            file.write("d\n")
    assert seen == ["d"]
