"""Which rank a hang is put down to, from the ranks' reports; a thread that looks, and when it speaks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import child_env, wait_for

from nc_dist import watchdog

PLACES = st.tuples(st.integers(1, 9), st.sampled_from(watchdog.PHASES[1:]))


def report(folder: Path, rank: int, step: int, phase: str) -> None:
    folder.mkdir(exist_ok=True)
    head = {"rank": rank, "step": step, "phase": phase, "seconds": 12.5}
    (folder / f"rank_{rank}.txt").write_text(json.dumps(head) + "\nThread 0x1:\n")


def test_the_rank_that_is_furthest_behind_is_named(tmp_path: Path) -> None:
    report(tmp_path, 0, 7, "gradients")
    report(tmp_path, 1, 7, "reading")
    report(tmp_path, 2, 8, "reading")
    line = watchdog.verdict(tmp_path, 3)
    assert line.startswith("hang: rank 1 at step 7, reading, for 12.5 s") and line.endswith("rank_1.txt")


def test_a_rank_without_a_report_is_named_first(tmp_path: Path) -> None:
    report(tmp_path, 0, 7, "gradients")
    report(tmp_path, 2, 7, "gradients")
    line = watchdog.verdict(tmp_path, 4)
    assert line.startswith("hang: ranks 1, 3 gives no sign of life") and "step 7, gradients" in line


def test_a_report_cut_short_counts_as_none(tmp_path: Path) -> None:
    report(tmp_path, 0, 7, "gradients")
    (tmp_path / "rank_1.txt").write_text('{"rank": 1, "st')
    assert "rank 1 gives no sign" in watchdog.verdict(tmp_path, 2)


@given(places=st.lists(PLACES, min_size=2, max_size=5))
def test_all_that_are_equally_far_behind_are_named(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("reports")
    for rank, (step, phase) in enumerate(places):
        report(folder, rank, step, phase)
    first = min(places, key=lambda place: (place[0], watchdog.PHASES.index(place[1])))
    named = [str(rank) for rank, place in enumerate(places) if place == first]
    line = watchdog.verdict(folder, len(places))
    assert line.split(" at ")[0].split(" ", 2)[2] == ", ".join(named)
    assert f"at step {first[0]}, {first[1]}," in line


def test_reports_of_an_earlier_attempt_are_put_aside(tmp_path: Path) -> None:
    report(tmp_path / "hangs", 0, 7, "reading")
    (tmp_path / "hangs/verdict.txt").write_text("hang: rank 0")
    assert watchdog.verdict_of(tmp_path) == "hang: rank 0"
    watchdog.clear(tmp_path)
    watchdog.clear(tmp_path)
    assert watchdog.verdict_of(tmp_path) is None and not (tmp_path / "hangs").exists()
    assert len(list(tmp_path.glob("hangs.*/rank_0.txt"))) == 1


SCRIPT = """
import sys, time
from pathlib import Path
from nc_dist.watchdog import watching

out, hang_s = Path(sys.argv[1]), float(sys.argv[2])
with watching(out, 0, 1, hang_s, print) as at:
    time.sleep(2 * hang_s)  # before the first step
    for step, phase, seconds in eval(sys.argv[3]):
        at(step, phase)
        time.sleep(seconds)
print("ended", flush=True)
"""


def watched(out: Path, places: list[tuple[int, str, float]]) -> tuple[int, str, str]:
    """Exit code and output of a process that is in each place for some seconds; half a second is a hang."""
    command = [sys.executable, "-c", SCRIPT, str(out), "0.5", repr(places)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=child_env())
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_phase_that_takes_too_long_ends_the_process_and_what_lies_between_steps_may_take_longer(
    tmp_path: Path,
) -> None:
    code, said, _ = watched(tmp_path, [(1, "reading", 0.2), (1, "between steps", 1.2), (2, "update", 0.2)])
    assert (code, said) == (0, "ended\n") and not (tmp_path / "hangs").exists()

    code, said, errors = watched(tmp_path, [(1, "update", 0.1), (2, "reading", 30)])
    assert code == 1 and said.startswith("hang: rank 0 at step 2, reading, for 0.5 s"), said
    assert "ended" not in said and "Timeout" not in errors, "the last resort was not needed"
    assert "SCRIPT" not in said and "<string>" in (tmp_path / "hangs/rank_0.txt").read_text()
    assert watchdog.verdict_of(tmp_path) == said.strip()


SUSPENDED = """
import sys, time
from pathlib import Path
from nc_dist.watchdog import watching

with watching(Path(sys.argv[1]), 0, 1, 2, print) as at:
    at(1, "reading")
    print("reading", flush=True)
    for _ in range(30):
        time.sleep(0.05)
print("ended", flush=True)
"""


@pytest.mark.slow
def test_a_process_that_was_itself_stopped_for_a_while_is_not_one_that_hangs(tmp_path: Path) -> None:
    """Suspended machines, debuggers: the phase takes 1.5 s of its own time, 4.5 s of everybody's; 2 s are a hang."""
    command = [sys.executable, "-c", SUSPENDED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_env()) as process:
        assert process.stdout and process.stdout.readline() == "reading\n"
        time.sleep(0.7)
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "ended\n" and process.wait(10) == 0
    assert not (tmp_path / "hangs").exists()


def test_another_rank_s_report_makes_this_one_report_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "LOOK_S", 0.1)
    with watchdog.watching(tmp_path, 0, 2, 60, print) as at:
        at(3, "gradients")
        report(tmp_path / "hangs", 1, 3, "reading")
        wait_for((tmp_path / "hangs/rank_0.txt").exists, 10, "a report")
        at(3, "update")
    assert watchdog.verdict(tmp_path / "hangs", 2).startswith("hang: rank 1 at step 3, reading")
    assert watchdog.verdict_of(tmp_path) is None
