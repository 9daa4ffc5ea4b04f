"""A rank that hangs is named with its step and phase, and its group ends: two real processes, joined by gloo."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from elastic import ranks, step_of
from PIL import Image
from processes import SMALL, Json, curve, read_json, wait_for

from nc_dist.config import PretrainRun
from nc_dist.data.catalog import open_source
from nc_dist.source_set import open_source_set
from nc_dist.spec import load

pytestmark = pytest.mark.slow

HANG_S = 10
SETTINGS = ["epochs=40", "measure_every=1000", "save_every=20", f"launch.hang_s={HANG_S}"]


def reported(out: Path, rank: int) -> tuple[Json, str]:
    """Head and stacks of a rank's report."""
    head, _, stacks = (out / f"hangs/rank_{rank}.txt").read_text().partition("\n")
    return json.loads(head), stacks


@pytest.fixture
def images(tmp_path: Path, small_shards: Path) -> Path:
    """Single files: 340 digits in ten folders."""
    source = open_source(str(small_shards))
    for position, label in enumerate(source.labels):
        path = tmp_path / "images" / source.class_names[label] / f"{position:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.read(position).permute(1, 2, 0).numpy().squeeze()).save(path)
    return tmp_path / "images"


def files_read(run: PretrainRun, rank: int, step: int) -> set[Path]:
    """The images that one of two ranks reads in a step."""
    data = open_source_set(run)
    positions = data.order.rank_step(*divmod(step - 1, data.order.steps_per_epoch), rank, 2)
    return {Path(run.data.train) / data.source.key(int(position)) for position in data.train[positions.ravel()]}


def test_a_rank_that_hangs_in_its_data_loading_is_named(images: Path, tmp_path: Path) -> None:
    """A pipe in the place of an image file: to open it takes until somebody writes."""
    out = tmp_path / "run"
    settings = [f"out={out}", f"data.train={images}", *SETTINGS]
    run = load(PretrainRun, SMALL, settings)
    pipe = min(files_read(run, 0, 1))  # again once an epoch of 9 steps, by either rank
    with ranks(tmp_path, 2, "pretrain", SMALL, *settings) as group:
        wait_for(lambda: step_of(out) >= 1, 90, "a step", group[0][0])
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "pipe").replace(pipe)
        codes = [process.wait(90) for process, _ in group]
        said = [log.read_text() for _, log in group]
    assert codes == [1, 1], said
    heads, stacks = zip(*(reported(out, rank) for rank in range(2)), strict=True)
    (hung,) = (rank for rank in range(2) if heads[rank]["phase"] == "reading")
    step = heads[hung]["step"]
    assert pipe in files_read(run, hung, step) and pipe not in files_read(run, 1 - hung, step)
    assert (heads[1 - hung]["step"], heads[1 - hung]["phase"]) == (step, "gradients")
    assert " in read" in stacks[hung] and "train_steps" in stacks[hung]

    line = f"hang: rank {hung} at step {step}, reading, for {heads[hung]['seconds']:g} s"
    assert (said[0] + said[1]).count("hang: ") == 1 and line in said[0] + said[1]
    status = read_json(out / "status.json")
    assert (status["state"], status["code"]) == ("failed", 1) and line in status["reason"], status


def test_a_rank_that_is_stopped_altogether_is_named_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["pretrain", SMALL, f"out={out}", *SETTINGS]
    with ranks(tmp_path, 2, *command) as group:
        wait_for(lambda: step_of(out) >= 30, 90, "30 steps", group[0][0])
        group[1][0].send_signal(signal.SIGSTOP)
        stopped_at = step_of(out)
        assert group[0][0].wait(60) == 1
        said = group[0][1].read_text()
        group[1][0].send_signal(signal.SIGKILL)
    waits = f"step {step_of(out) + 1}, (gradients|update)"  # for what rank 1 owed it when it was stopped
    assert re.search(f"hang: rank 1 gives no sign of life.* {waits}", said), said
    assert step_of(out) - stopped_at <= 2
    assert "rank 1" in read_json(out / "status.json")["reason"]
    assert not (out / "hangs/rank_1.txt").exists()

    with ranks(tmp_path, 1, *command) as [(process, _)]:
        wait_for(lambda: step_of(out) >= stopped_at + 5, 90, "more steps", process)
    assert list(curve(out)) == list(range(1, len(curve(out)) + 1)), "no step twice, none left out"
    assert list(out.glob("hangs.*/rank_0.txt")), "the reports are put aside, not lost"


def test_what_one_rank_failed_by_is_told_and_not_that_the_other_one_lost_it(images: Path, tmp_path: Path) -> None:
    """A file is gone that rank 1 reads in each of the first epochs; rank 0, which writes the status, loses rank 1."""
    out = tmp_path / "run"
    settings = [f"out={out}", f"data.train={images}", *SETTINGS]
    run = load(PretrainRun, SMALL, settings)
    epochs = [range(9 * epoch + 1, 9 * epoch + 10) for epoch in range(5)]
    mine = set.intersection(*(set[Path]().union(*(files_read(run, 1, step) for step in steps)) for steps in epochs))
    with ranks(tmp_path, 2, "pretrain", SMALL, *settings) as group:
        wait_for(lambda: step_of(out) >= 1, 90, "a step", group[0][0])
        gone = min(mine)
        gone.unlink()
        codes = [process.wait(90) for process, _ in group]
    said = [log.read_text() for _, log in group]
    assert codes == [1, 2], said
    status = read_json(out / "status.json")
    assert (status["state"], status["code"]) == ("bad_input", 2) and str(gone) in status["reason"], status
    assert f"error: {gone}" in said[1] and "Traceback" not in said[1]
