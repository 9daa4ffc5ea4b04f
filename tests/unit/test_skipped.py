"""Skipped steps: which are counted, what is written of them, and what a resumed run keeps."""

import json
from pathlib import Path

import pytest
import torch

from nc_dist.data.source import open_folder
from nc_dist.data.stream import Batch
from nc_dist.errors import Diverged, exit_code
from nc_dist.loop import Step
from nc_dist.skipped import BACKOFFS, FILE, Skipped
from nc_dist.world import World


def step(number: int, loss: float, applied: bool = False) -> Step:
    batches = [Batch(torch.zeros(2, 3, 1, 1), torch.zeros(2), torch.tensor([i, i + 2])) for i in (0, 1)]
    totals = torch.tensor([loss, 0, 0, loss], dtype=torch.float64)
    return Step(number, 0.1, float("nan"), 1.0, 0.0, applied, False, False, batches, ["ce"], totals)


def test_steps_are_counted_and_listed_with_their_samples_until_there_are_too_many(
    image_folder: Path, tmp_path: Path
) -> None:
    source, skipped = open_folder(image_folder), Skipped(tmp_path, 2, False, World())
    skipped.add(step(1, 2.5, applied=True), source)
    assert not (tmp_path / FILE).exists()
    skipped.add(step(2, float("nan")), source)
    skipped.add(step(3, 2.5), source)  # the gradients were not finite
    with pytest.raises(Diverged, match=r"step 5: the loss is inf\. 3 steps were skipped, max_skipped=2") as raised:
        skipped.add(step(5, float("inf")), source)
    assert exit_code(raised.value) == 1
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, "nan"), (3, 2.5), (5, "inf")]
    assert lines[0]["keys"] == [source.key(position) for position in (0, 2, 1, 3)]


def test_a_resumed_run_keeps_the_count_and_the_lines_up_to_where_it_goes_on(image_folder: Path, tmp_path: Path) -> None:
    source, first = open_folder(image_folder), Skipped(tmp_path, 5, False, World())
    for number in (2, 4, 7):
        first.add(step(number, float("nan")), source)
    resumed = Skipped(tmp_path, 5, False, World(), start=5, count=2)
    resumed.add(step(6, float("nan")), source)
    assert resumed.count == 3
    assert [json.loads(line)["step"] for line in (tmp_path / FILE).read_text().splitlines()] == [2, 4, 6]


def test_gradients_that_overflow_under_a_loss_scale_count_only_when_halving_it_does_not_help(
    image_folder: Path, tmp_path: Path
) -> None:
    source, skipped = open_folder(image_folder), Skipped(tmp_path, 1, True, World())
    for number in range(BACKOFFS):
        skipped.add(step(number, 2.5), source)
    skipped.add(step(100, 2.5, applied=True), source)
    for number in range(101, 101 + BACKOFFS):
        skipped.add(step(number, 2.5), source)
    assert skipped.count == 0
    skipped.add(step(200, 2.5), source)
    assert skipped.count == 1
    with pytest.raises(Diverged, match="step 201: the loss is nan"):
        skipped.add(step(201, float("nan")), source)
