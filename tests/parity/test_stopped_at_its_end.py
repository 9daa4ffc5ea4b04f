"""A run that is asked to stop when all steps are taken stops all the same, and the same command ends it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import SMALL, curve

from nc_dist.checkpoint import upload
from nc_dist.checkpoint.manifest import checkpoints_in, step_of
from nc_dist.checkpoint.places import Place
from nc_dist.config import PretrainRun
from nc_dist.errors import Preempted
from nc_dist.pretrain import pretrain
from nc_dist.run_folder import prepare
from nc_dist.source_set import open_source_set
from nc_dist.spec import load
from nc_dist.world import World

pytestmark = pytest.mark.slow


def asked_after(times: int) -> Callable[[], bool]:
    """Whether to stop: the loop asks once a step."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > times

    return stop


def run_of(out: Path, *more: str) -> tuple[PretrainRun, int]:
    """A short run, its folder made, and how many steps it takes."""
    run = load(PretrainRun, SMALL, [f"out={out}", "epochs=0.2", "engine.kind=torch", "save_every=1000", *more])
    return run, open_source_set(run).steps if prepare(run) else 0


def test_a_stop_at_the_last_step_saves_and_the_next_start_only_finishes(tmp_path: Path) -> None:
    run, steps = run_of(tmp_path / "run")
    with pytest.raises(Preempted, match=f"step {steps}"):
        pretrain(run, World(), asked_after(steps - 1))
    assert [step_of(place) for place in checkpoints_in(run.out)] == [steps]
    losses = curve(tmp_path / "run")
    assert pretrain(run, World(), lambda: False)["steps"] == steps
    assert losses.items() <= curve(tmp_path / "run").items() and (tmp_path / "run/export").is_dir()


def test_a_stop_while_the_last_checkpoint_is_uploaded_ends_the_run_and_the_next_start_uploads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, goes_on, alive = Place.put, threading.Event(), list[tuple[int, str]]()

    def slow(self: Place, source: Path, name: str) -> None:
        goes_on.wait(20)
        put(self, source, name)

    monkeypatch.setattr(Place, "put", slow)
    monkeypatch.setattr(upload, "STOP_WAIT_S", 0.1)
    monkeypatch.setattr(upload, "POLL_S", 0.05)
    run, steps = run_of(tmp_path / "run", f"upload=file://{tmp_path}/there")
    with pytest.raises(Preempted, match=f"step {steps}"):
        pretrain(run, World(), asked_after(steps + 3), lambda step, phase: alive.append((step, phase)))
    assert alive[-4:] == [(steps, "between steps")] * 4, "the watchdog hears of it while the run waits"
    goes_on.set()
    result = pretrain(run, World(), lambda: False)
    assert result["upload"]["uploaded"] == [steps] and checkpoints_in(f"file://{tmp_path}/there")
