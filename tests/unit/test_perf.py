"""The scalars of speed and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import SMALL

from nc_dist.config import PretrainRun
from nc_dist.gpus import gpu
from nc_dist.loop import Step
from nc_dist.perf import Perf, perf_of
from nc_dist.spec import load
from nc_dist.world import World

STEP = Step(7, 0.1, 1.0, 0.5, 0.125, True, [], [], torch.zeros(0))


def test_images_and_waiting_are_told_and_no_mfu_where_the_peak_is_unknown() -> None:
    run = load(PretrainRun, SMALL, [])
    found = perf_of(run, 10, World()).scalars(STEP)
    assert found["perf/images_per_second"] == 32 / 0.5 and found["perf/data_wait_frac"] == 0.25
    assert "perf/mfu" not in found and "sys/gpu_memory_gb" not in found
    now = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e9
    assert now * 0.99 <= found["sys/rss_gb"] < 64


def test_mfu_is_three_forwards_of_each_view_over_the_peak_of_all_gpus() -> None:
    forward = 1_000_000_000
    perf = Perf(World(0, 4), batch=32, views=2, precision="bf16", gpu=gpu("a100"), forward=forward)
    assert perf.scalars(STEP)["perf/mfu"] == pytest.approx(3 * forward * 2 * 64 / (4 * 312e12))


def test_the_forward_of_a_known_gpu_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "device_name", "NVIDIA H200")
    perf = perf_of(load(PretrainRun, SMALL, []), 10, World())
    assert perf.gpu == gpu("h200")
    macs = 8 * 8 * 8 * 27 + 2 * 8 * 8 * 8 * 72  # the stem and the first block of resnet8 at 8 pixels
    assert perf.forward > 2 * macs
