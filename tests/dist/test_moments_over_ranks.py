"""Class moments of real gloo ranks are those of one process, whoever holds which sample."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from processes import run_ranks

from nc_dist.measure import collapse
from nc_dist.nc import ClassMoments
from nc_dist.world import World

CLASSES, DIM = 5, 7
SPLITS = ("strided", "one rank empty", "each class on one rank only")


def samples(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Uneven classes, far from the origin."""
    random = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor([40, 25, 11, 6, 2]))
    centres = 10 * torch.randn(CLASSES, DIM, generator=random)
    return (centres[labels] + torch.randn(len(labels), DIM, generator=random)).to(dtype), labels


def held_by(rank: int, size: int, split: str, labels: torch.Tensor) -> torch.Tensor:
    """Which samples a rank has."""
    rows = torch.arange(len(labels))
    if split == "strided":
        return rows[rank::size]
    if split == "one rank empty":
        return rows[:0] if rank == size - 1 else rows[rank :: size - 1]
    return rows[labels % size == rank]


def measured(world: World, split: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Statistics, and all metrics."""
    feats, labels = samples(dtype)
    mine = held_by(world.rank, world.size, split, labels) if world.size > 1 else torch.arange(len(labels))
    moments = ClassMoments(CLASSES, DIM)
    moments.update(feats[mine], labels[mine])
    return vars(moments.all_reduce(world.sum_).statistics()), collapse(feats[mine], labels[mine], CLASSES, world)


def measured_each_way(world: World) -> dict[Any, Any]:
    return {
        (split, dtype): measured(world, split, dtype) for split in SPLITS for dtype in (torch.float32, torch.float64)
    }


@lru_cache
def over_ranks(size: int) -> list[Any]:
    return run_ranks(measured_each_way, size)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_fp64_moments_of_ranks_are_those_of_one_process(size: int, split: str) -> None:
    found, (expected, _) = over_ranks(size)[0][split, torch.float64][0], measured(World(), split, torch.float64)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_fp32_metrics_of_ranks_are_those_of_one_process(size: int, split: str) -> None:
    found, (_, expected) = over_ranks(size)[0][split, torch.float32][1], measured(World(), split, torch.float32)
    # The null permutes the samples in rank order: another draw of the same distribution.
    numbers = {k: v for k, v in expected.items() if isinstance(v, int | float) and k != "nc1_null"}
    assert len(numbers) > 8 and {"nc1", "nc1_trace", "nc2_equiangular", "ncc_acc1"} <= numbers.keys()
    for name, value in numbers.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_have_the_same_bits(size: int) -> None:
    first, *others = over_ranks(size)
    for key, (statistics, metrics) in first.items():
        for other in others:
            assert all(torch.equal(value, other[key][0][name]) for name, value in statistics.items()), key
            assert metrics == other[key][1], key


def nothing(world: World) -> dict[str, Any]:
    return collapse(torch.zeros(0, DIM), torch.zeros(0, dtype=torch.int64), CLASSES, world)


def test_ranks_without_any_sample_have_no_nc1() -> None:
    for values in run_ranks(nothing, 2):
        assert values["N"] == 0 and values["nc1"] is None and values["ncc_acc1"] is None
