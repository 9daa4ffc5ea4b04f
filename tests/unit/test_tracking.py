"""What a run writes while it goes on: rows and events, one of each step, also after a resume."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from nc_dist.figures.gram import MOST, gram_figure, shown_classes
from nc_dist.tracking import FILE, HPARAMS, OUTCOMES, Tracker, cut_back, flat_nc
from nc_dist.world import World


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / FILE).read_text().splitlines()]


def board(out: Path) -> EventAccumulator:
    events = EventAccumulator(str(out / "tb"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def curve(out: Path, key: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 5)) for event in board(out).Scalars(key)]


def attempt(out: Path, start: int, steps: range, value: float, closes: bool = True) -> None:
    """One attempt at a run: goes on from `start`, writes `steps`; a killed one does not close its files."""
    tracker = Tracker(out, World(), start)
    for step in steps:
        tracker.scalars(step, {"loss": value + step})
    if closes:
        tracker.close()
    else:
        assert tracker._board is not None
        tracker._board.flush()


def test_rows_and_events_hold_the_same_finite_values(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, World())
    tracker.scalars(1, {"a": 1, "b": None, "c": math.nan}, steps=10)
    tracker.scalars(2, {"a": 2.5, "c": math.inf, "d/e": 3.0})
    tracker.close()
    assert rows(tmp_path) == [{"step": 1, "a": 1.0, "steps": 10}, {"step": 2, "a": 2.5, "d/e": 3.0}]
    assert set(board(tmp_path).Tags()["scalars"]) == {"a", "d/e"}
    assert curve(tmp_path, "a") == [(1, 1.0), (2, 2.5)]


def test_rows_are_there_at_once(tmp_path: Path) -> None:
    """The console reads them while the run goes on."""
    tracker = Tracker(tmp_path, World())
    tracker.scalars(1, {"a": 1})
    assert rows(tmp_path) == [{"step": 1, "a": 1.0}]
    tracker.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, World(rank=1, size=2))
    tracker.scalars(1, {"a": 1})
    tracker.custom_page()
    tracker.class_means(1, class_means_of(3), ["a", "b", "c"], projector=True)
    tracker.hparams({}, {})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_a_resume_leaves_no_step_twice(tmp_path: Path, start: int) -> None:
    """Killed after step 5, resumed from `start`; 0 is a restart before the first checkpoint, with its row of step 0."""
    attempt(tmp_path, 0, range(0, 6), 100, closes=False)
    attempt(tmp_path, start, range(start + 1 if start else 0, 8), 200)
    kept = [] if start == 0 else [(step, 100.0 + step) for step in range(start + 1)]
    expected = kept + [(step, 200.0 + step) for step in range(len(kept), 8)]
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == expected
    assert curve(tmp_path, "loss") == expected


def test_cut_back_drops_later_rows_and_one_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text('{"step": 1}\n{"step": 2, "a": 1}\n{"step": 3}\n{"step": 2, "a"')
    cut_back(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "a": 1}\n'
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    cut_back(tmp_path / "none.jsonl", 2)


def hparams_of(out: Path) -> tuple[dict[str, str], set[str]]:
    events = board(out)
    found = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(found).session_start_info
    return {key: value.string_value for key, value in start.hparams.items()}, set(events.Tags()["scalars"])


def test_every_run_has_the_same_hparams_and_outcomes(tmp_path: Path) -> None:
    """TensorBoard takes its columns from the first run that it meets."""
    given: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"journey": "pretrain", "loss": "ce", "lr": 0.1, "surplus": 1}, {"accuracy": 0.5, "nc1_source": None}),
        ({"journey": "finetune", "method": "full"}, {"accuracy": None, "trainable_percent": 8.2, "surplus": 1}),
    ]
    for i, (about, outcome) in enumerate(given):
        (tmp_path / str(i)).mkdir()
        tracker = Tracker(tmp_path / str(i), World())
        tracker.hparams(about, outcome)
        tracker.close()
        settings, outcomes = hparams_of(tmp_path / str(i))
        assert settings == {key: str(about.get(key, "")) for key in HPARAMS}
        assert outcomes == {f"hparam/{key}" for key in OUTCOMES}
    assert not [path for path in (tmp_path / "0/tb").iterdir() if path.is_dir()]  # run_name ".": one run, not two


def test_the_custom_page_names_curves_that_exist(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, World())
    tracker.custom_page()
    tracker.close()
    layout = str(board(tmp_path).Tensors("custom_scalars__config__"))
    for name in ("nc/train_before/nc1", "nc/heldout_after/nc4"):
        assert name in layout


def class_means_of(num_classes: int, dim: int = 5) -> torch.Tensor:
    means = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))
    return means - means.mean(0)


def test_class_means_are_an_image_and_points_with_names_in_the_projector(tmp_path: Path) -> None:
    tracker, means = Tracker(tmp_path, World()), class_means_of(4)
    tracker.class_means(7, means, ["a", "two words", "tab\there", ""], projector=True)
    tracker.close()
    events = board(tmp_path)
    (image,) = events.Images("nc/gram")
    assert image.step == 7 and image.width > 100 and image.encoded_image_string.startswith(b"\x89PNG")

    config = text_format.Parse((tmp_path / "tb/projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    folder = tmp_path / "tb"
    points = [
        [float(x) for x in line.split("\t")] for line in (folder / embedding.tensor_path).read_text().splitlines()
    ]
    assert torch.allclose(torch.tensor(points), means, atol=1e-6)
    assert (folder / embedding.metadata_path).read_text().splitlines() == ["a", "two words", "tab here", "-"]


def test_the_figure_of_a_collapsed_net_is_a_simplex_etf(tmp_path: Path) -> None:
    eye = torch.eye(5)
    figure = gram_figure(3 * (eye - eye.mean(0)))
    shown = figure.axes[0].get_images()[0].get_array()
    assert np.allclose(shown, np.where(np.eye(5) == 1, 1, -1 / 4))
    assert "all 5 classes" in figure.axes[0].get_title() and "simplex ETF: -0.25" in figure.axes[0].get_title()


def test_of_many_classes_some_are_drawn_and_the_figure_says_so() -> None:
    assert shown_classes(3) == [0, 1, 2] and len(set(shown_classes(1000))) == MOST == len(shown_classes(1000))
    figure = gram_figure(class_means_of(1000))
    assert figure.axes[0].get_images()[0].get_array().shape == (MOST, MOST)
    assert f"{MOST} of 1000 classes" in figure.axes[0].get_title()


def test_flat_nc_has_every_number_and_no_text() -> None:
    probe = {
        "before": {"nc1": 2.0, "N": 30, "reasons": {"nc2": "why"}, "nc4": None},
        "after": {"nc1": 1.0},
        "acc1": 0.5,
    }
    places = {"nc/train_before/nc1": 2.0, "nc/train_before/N": 30, "nc/train_after/nc1": 1.0}
    assert flat_nc("train", probe) == {**places, "nc/train_acc1": 0.5}
    assert flat_nc("heldout", {"acc1": 0.5}) == {"val/acc1": 0.5}
