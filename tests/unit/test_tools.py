"""The scripts in tools/ that import the package: they load, and their numbers come from what they name."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nc_dist.plan.model_cost import model_cost
from nc_dist.world import World

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


LOADED = ["bench_nc", "bench_data", "bench_train", "order_quality", "figure_nc", "figure_demo", "demo", "gpu_check"]


@pytest.mark.parametrize("name", [*LOADED, "gpu_agree", "source_variants"])
def test_a_script_loads(name: str) -> None:
    assert callable(loaded(name).main)


def test_the_bench_compares_ways_that_all_compute_nc1(capsys: pytest.CaptureFixture[str]) -> None:
    bench = loaded("bench_nc")
    wrong = bench.errors(64, 10, "cpu")
    assert wrong["ours"] < 1e-6 > wrong["ours, triangular"] and wrong["two-pass"] < 1e-5 < 1e-3 < wrong["naive fp32"]
    bench.bench(32, 5, "cpu", rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["floor", *["ours", "ours,", "ours,"], "naive", "naive", "two-pass"]


@pytest.mark.slow
def test_the_measure_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    loaded("bench_nc").measure_all_blocks("cpu", samples=20, threads=1, size=32)
    torch.set_num_threads(threads)
    assert "ratios" in capsys.readouterr().out


def test_the_data_bench_times_every_way_on_images_of_imagenets_size(capsys: pytest.CaptureFixture[str]) -> None:
    threads, tool = torch.get_num_threads(), loaded("bench_data")
    tool.bench(count=12, rounds=1, seconds=0.0, batch=4, workers=(0,))
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    mean = re.search(r"12 JPEGs, mean (\d+) KB", said)
    assert mean is not None and 60 < int(mean[1]) < 140
    ways, ratios = (part.splitlines()[1:] for part in said.split("\n\n")[1:])
    assert len(ways) == 10 and len(ratios) == 13
    assert all(float(line[46:].split()[0]) > 0 for line in ways)


def test_the_data_bench_counts_the_time_of_the_processes_below_it() -> None:
    tool = loaded("bench_data")
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    before = tool.cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        spent = tool.cpu_seconds() - before
        child.communicate(b"\n")
    assert spent > 0.25  # the system counts in hundredths


@pytest.mark.slow
def test_the_data_bench_runs_with_workers() -> None:
    script = str(TOOLS / "bench_data.py")
    done = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ours, short side 256 / ImageFolder, PIL, uint8" in done.stdout


def test_the_order_mixes_class_sorted_data_as_a_permutation_does_and_a_bad_setting_shows() -> None:
    """chi2/dof: 1 is chance, below it more even than chance."""
    tool = loaded("order_quality")
    shape = tool.SHAPES[1]  # CIFAR-100's
    perfect = tool.quality(tool.permuted(shape), shape)
    default = tool.quality(tool.ours(shape), shape)
    unmixed = tool.quality(tool.ours(shape, lanes=1, window=1), shape)
    theirs = tool.quality(tool.webdataset_shuffled(shape, 1000, 1), shape)
    assert abs(perfect["chi2/dof"] - 1) < 0.05 and abs(perfect["lag 1"]) < 0.01
    assert 0.7 < default["chi2/dof"] < 1.1 and 0.7 < default["x10"] < 1.1
    assert abs(default["classes"] - perfect["classes"]) < 2
    assert max(default["lag 1"], default["lag B"]) < 0.3
    assert unmixed["chi2/dof"] > 50 < unmixed["x10"] and unmixed["lag 1"] > 0.9
    assert theirs["chi2/dof"] > 10


def test_a_wider_window_brings_the_order_nearer_to_a_permutation() -> None:
    tool = loaded("order_quality")
    shape = tool.SHAPES[1]
    lags = [tool.quality(tool.ours(shape, window=window), shape)["lag B"] for window in (1, 4, 16)]
    assert lags[0] > 0.9 and lags[1] < 0.3 and lags[2] < 0.05


def test_the_gpu_check_has_the_plans_own_memory_beside_what_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    check = loaded("gpu_check")
    monkeypatch.delenv("RANK", raising=False)
    found = check.train_case("resnet50", "torch", quick=True, shards=None)
    assert found["images/s"] > 0 and 0 < found["loss"] < 20
    spec, input, optim, images = check.setting("resnet50", True)
    cost = model_cost(spec, check.CLASSES, input, images, "bf16")
    numbers = sum(cost.trained)
    held = 4 * 3 * numbers + cost.buffers  # weights, gradients, momentum
    assert found["planned"] * 2**30 == pytest.approx(held + max(cost.activations, 4 * numbers))
    assert found["flops"] == cost.flops
    names = ("ZeRO 2", "ZeRO 2, optimiser on CPU")
    there, on_cpu = (check.plan_of(spec, input, optim, images, name, World(0, 2))["planned"] for name in names)
    assert (there - on_cpu) * 2**30 == pytest.approx(4 * (3 * numbers / 2), rel=1e-3)  # gradients, masters, momentum


@pytest.mark.slow
def test_the_gpu_check_tells_a_case_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = loaded("gpu_check")
    monkeypatch.setattr(check, "ENGINES", {"no such engine": {}})
    monkeypatch.setattr(check, "MODELS", {"resnet50": 8})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--quick", "--only", "speed"])
    assert check.main() == 1
    said = capsys.readouterr().out
    assert re.search(r"\| resnet50 \| no such engine \| synthetic \| KeyError", said)


@pytest.mark.slow
def test_the_gpu_check_compares_losses_and_tells_what_the_statistics_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_agree.py", "--quick"])
    assert loaded("gpu_agree").main() == 0
    said = capsys.readouterr().out
    assert re.search(r"\| fp32 beside CPU fp32 \| 0.0e\+00", said) or torch.cuda.is_available()
    assert ("SyncBatchNorm: needs two GPUs, not exercised" in said) == (torch.cuda.device_count() < 2)
    assert re.search(r"\| float64 \| [\d.]+ \| [\d.]+ % \| [\d.]+ % \|", said)
