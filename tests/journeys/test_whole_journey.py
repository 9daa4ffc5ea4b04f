"""From shards to a report by the commands that a user types, in one process each."""

from __future__ import annotations

import csv
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml
from processes import ROOT, SMALL, cli, files_of, read_json, rows, said
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nc_dist.launch.start import start

PRETRAIN, MEASURE, FINETUNE = SMALL, ROOT / "configs/measure/digits.yaml", ROOT / "configs/finetune/digits.yaml"


@dataclass(frozen=True)
class Walk:
    """Where everything is, the arguments of each command, and what it said."""

    folder: Path
    commands: dict[str, list[str]]
    said: dict[str, CompletedProcess[str]]

    @property
    def source(self) -> Path:
        return self.folder / "runs/source"


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    folder = tmp_path_factory.mktemp("walk")
    runs, shards = folder / "runs", folder / "shards/train"
    source, sweep = runs / "source", folder / "sweep.yaml"
    few = {"train": "digits", "shots": 10}
    base = {
        "source": str(source),
        "data": few,
        "method": {"kind": "full"},
        "epochs": 2,
        "batch": {"global": 20, "micro": 20},
    }
    grid = {"method.kind": ["linear_probe", "layer_ft"], "seed": [0, 1]}
    sweep.write_text(yaml.safe_dump({"out": str(runs / "sweep"), "base": base, "grid": grid}))
    small = ["data.train=digits", "data.shots=10", "epochs=3", "batch.global=20", "batch.micro=20"]
    commands = {
        "build": ["shards", "build", "digits:train", shards, "--per-class", 30, "--samples-per-shard", 80],
        "verify": ["shards", "verify", shards],
        "pretrain": ["pretrain", PRETRAIN, f"out={source}", f"data.train={shards}", "data.test=digits:test", "epochs=6",
                     "measure_every=null", "--on", "here"],
        "measure": ["measure", MEASURE, f"model={source}", f"data={shards}", f"out={runs / 'nc'}"],
        "finetune": ["finetune", FINETUNE, f"source={source}", f"out={runs / 'trial'}", *small],
        "sweep": ["sweep", sweep, "--on", "here"],
        "report": ["report", runs],
    }  # fmt: skip
    words = {name: [str(word) for word in command] for name, command in commands.items()}
    done = {name: cli(*command) for name, command in words.items()}
    return Walk(folder, words, done)


def test_every_command_ends_with_exit_code_0_and_a_clean_stderr(walk: Walk) -> None:
    for name, done in walk.said.items():
        assert done.returncode == 0, f"{name}: {said(done)}"
        assert done.stderr == "", f"{name} is noisy: {done.stderr}"


def test_shards_are_built_whole(walk: Walk) -> None:
    assert "300 samples of 10 classes" in walk.said["build"].stdout and "0 faults" in walk.said["verify"].stdout
    assert len(list((walk.folder / "shards/train").glob("*.tar"))) == 4


def test_a_run_folder_holds_what_the_readme_lists(walk: Walk) -> None:
    names = {"run.yaml", "env.json", "status.json", "metrics.jsonl", "result.json", "tb", "checkpoints", "export"}
    assert {path.name for path in walk.source.iterdir()} == names
    assert read_json(walk.source / "status.json")["state"] == "done"
    last = (walk.source / "checkpoints/last").resolve()
    assert last.name == f"step_{read_json(walk.source / 'result.json')['steps']}"
    assert "fc.weight" in load_file(walk.source / "export/model.safetensors")
    assert read_json(walk.source / "result.json")["source_accuracy"] > 0.5


def test_ten_live_nc_points_or_more_in_metrics_and_tensorboard(walk: Walk) -> None:
    steps = read_json(walk.source / "result.json")["steps"]
    events = EventAccumulator(str(walk.source / "tb")).Reload()
    for probe in ("train", "heldout"):
        for metric in ("nc1", "nc1_trace", "nc2_equiangular", "nc3_zhu", "nc4"):
            key = f"nc/{probe}_after/{metric}"
            live = [(row["step"], row[key]) for row in rows(walk.source) if key in row]
            assert len(live) >= 10 and live[0][0] == 0 and live[-1][0] == steps, key
            assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(key)] == live
    assert "hparam/accuracy" in events.Tags()["scalars"]


def test_the_share_of_measuring_is_tracked_and_too_few_samples_are_told_once(walk: Walk) -> None:
    measured = [row for row in rows(walk.source) if "nc/train_after/nc1" in row]
    assert all(0 < row["perf/measure_frac"] < 1 for row in measured[1:])
    assert all(row["nc/heldout_after/nc1_split_half"] > 0.05 for row in measured), "five images a class are too few"
    assert measured[-1]["nc/heldout_after/nc1_test_about_train"] > measured[-1]["nc/heldout_after/nc1_floor"] > 0
    warned = [
        line for line in walk.said["pretrain"].stdout.splitlines() if line.startswith("warning, NC of heldout: n")
    ]
    assert len(warned) == 1 and "n = 5 a class is too small" in warned[0]


def test_the_console_shows_lines_as_people_know_them(walk: Walk) -> None:
    line = walk.said["pretrain"].stdout.splitlines()[-4]
    assert all(word in line for word in ("ep 6 [", "loss", "top1", "nc1", "img/s", "data", "lr", "eta")), line


def test_measure_sees_every_block(walk: Walk) -> None:
    nc = read_json(walk.folder / "runs/nc/nc.json")
    blocks = [block["name"] for block in read_json(walk.source / "export/config.json")["blocks"]]
    assert len(blocks) == 3 and set(nc) >= {*blocks, "before", "after"}
    assert all(nc[place]["N"] == 300 and nc[place]["nc1"] > 0 for place in blocks)
    with (walk.folder / "runs/nc/nc.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(blocks) + 2


def test_finetune_writes_a_row_of_the_ledger(walk: Walk) -> None:
    row = read_json(walk.folder / "runs/trial/result.json")
    assert row["method"] == "scl_ft" and row["variant"] == "source" and row["dataset"] == "digits"
    assert 0 < row["trainable_percent"] < 100 and 0 <= row["accuracy"] <= 1 and row["train_samples"] == 100
    assert row["nc1_source"] == read_json(walk.source / "result.json")["nc1_source"]


def test_sweep_and_report_have_one_row_a_trial(walk: Walk) -> None:
    with (walk.folder / "runs/sweep/results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    runs = walk.folder / "runs"
    ledger = [json.loads(line) for line in (runs / "results.jsonl").read_text().splitlines()]
    assert len(ledger) == 5
    keys = {"variant", "dataset", "method", "accuracy", "nc1_source", "nc1_downstream", "trainable_percent", "seconds"}
    assert all(row.keys() >= keys and row["nc1_downstream"] > 0 for row in ledger)
    page = (runs / "report.html").read_text()
    assert "layer_ft" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert (runs / "report.md").is_file()


@pytest.mark.parametrize("name", ["pretrain", "measure", "finetune"])
def test_a_finished_run_returns_at_once_and_is_not_touched(
    walk: Walk, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    journey, file, *overrides = [word for word in walk.commands[name] if word not in ("--on", "here")]
    before, began = files_of(walk.folder / "runs"), time.monotonic()
    assert start(journey, Path(file), overrides, "here", False, None, False) == 0
    assert time.monotonic() - began < 5 and "finished already" in capsys.readouterr().out
    assert files_of(walk.folder / "runs") == before


def test_a_finished_sweep_runs_no_trial(walk: Walk, capsys: pytest.CaptureFixture[str]) -> None:
    trials = walk.folder / "runs/sweep/trials"
    before = files_of(trials)
    assert start("sweep", Path(walk.commands["sweep"][1]), [], "here", False, None, False) == 0
    assert "finished already" in capsys.readouterr().out and files_of(trials) == before


@pytest.mark.parametrize("name", ["pretrain", "measure", "finetune", "sweep"])
def test_a_dry_run_touches_nothing(walk: Walk, name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    journey, file, *overrides = [word for word in walk.commands[name] if word not in ("--on", "here")]
    before, here = files_of(walk.folder), sorted(os.listdir(ROOT))
    assert start(journey, Path(file), [*overrides, f"out={tmp_path / 'x/y'}"], "here", True, None, False) == 0
    assert str(tmp_path / "x/y") in capsys.readouterr().out
    assert files_of(walk.folder) == before and os.listdir(tmp_path) == [] and sorted(os.listdir(ROOT)) == here
