"""The scalars of speed and memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import SMALL

from nc_dist.config import PretrainRun
from nc_dist.loop import Step
from nc_dist.perf import Perf, perf_of
from nc_dist.plan.gpus import gpu
from nc_dist.spec import load
from nc_dist.world import World

STEP = Step(7, 0.1, 1.0, 0.5, 0.125, True, False, False, [], [], torch.zeros(0))


def test_images_and_waiting_are_told_and_no_mfu_where_the_peak_is_unknown() -> None:
    run = load(PretrainRun, SMALL, [])
    perf = perf_of(run, 10, World())
    for step in (STEP, replace(STEP, seconds=1.5, data_seconds=0.375)):
        perf.add(step)
    found = perf.scalars()
    assert found["perf/images_per_second"] == 2 * 32 / 2 and found["perf/data_wait_frac"] == 0.25
    assert "perf/mfu" not in found and "sys/gpu_memory_gb" not in found
    now = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e9
    assert now * 0.99 <= found["sys/rss_gb"] < 64


def test_mfu_is_three_forwards_of_each_view_over_the_peak_of_all_gpus() -> None:
    forward = 1_000_000_000
    perf = Perf(World(0, 4), batch=32, views=2, peak=gpu("a100").peak("bf16"), forward=forward)
    perf.add(STEP)
    assert perf.scalars()["perf/mfu"] == pytest.approx(3 * forward * 2 * 64 / (4 * 312e12))


def test_the_forward_of_a_known_gpu_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "device_name", "NVIDIA H200")
    perf = perf_of(load(PretrainRun, SMALL, []), 10, World())
    assert perf.peak == gpu("h200").peak("fp32")
    macs = 8 * 8 * 8 * 27 + 2 * 8 * 8 * 8 * 72  # the stem and the first block of resnet8 at 8 pixels
    assert perf.forward > 2 * macs


def test_the_peak_of_a_transformer_in_fp32_is_not_that_of_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "device_name", "NVIDIA H200")
    vit = ["model.backbone.kind=torchvision", "model.backbone.name=vit_b_16", "model.backbone.image_size=32"]
    perf = perf_of(load(PretrainRun, SMALL, [*vit, "input.size=32"]), 10, World())
    assert perf.peak == 67e12 and perf.forward > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_net_that_cannot_be_traced_runs_on_a_known_gpu_without_mfu_and_the_first_rank_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    monkeypatch.setattr(World, "device_name", "NVIDIA H200")
    monkeypatch.setenv("NC_DIST_ALLOW_USER_CODE", "1")
    own = ["model.backbone={kind: own, function: test_model_cost:looks_at_values, image_size: 8}"]
    perf = perf_of(load(PretrainRun, SMALL, own), 10, World(rank, 2))
    perf.add(STEP)
    assert "perf/mfu" not in perf.scalars()
    said = capsys.readouterr().out
    assert ("perf/mfu: not logged, the net cannot be traced" in said) == (rank == 0)
