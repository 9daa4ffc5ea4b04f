"""The scripts in tools/ that import the package: they load, and their numbers come from what they name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["bench_nc", "figure_nc", "figure_demo", "demo"])
def test_a_script_loads(name: str) -> None:
    assert callable(loaded(name).main)


def test_the_bench_compares_ways_that_all_compute_nc1(capsys: pytest.CaptureFixture[str]) -> None:
    bench = loaded("bench_nc")
    wrong = bench.errors(64, 10, "cpu")
    assert wrong["ours"] < 1e-6 > wrong["ours, triangular"] and wrong["two-pass"] < 1e-5 < 1e-3 < wrong["naive fp32"]
    bench.bench(32, 5, "cpu", rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["floor", *["ours", "ours,", "ours,"], "naive", "naive", "two-pass"]


def test_the_measure_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    loaded("bench_nc").measure_all_blocks("cpu", samples=20, threads=1, size=32)
    torch.set_num_threads(threads)
    assert "ratios" in capsys.readouterr().out
