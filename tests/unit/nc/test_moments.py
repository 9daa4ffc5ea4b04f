"""Class moments: any split, order and number of parts gives one result, in the precision that was asked for.

Letters: B samples, K classes, D dimensions.
"""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nc_reference import (
    accumulated,
    all_reduced,
    assert_same,
    class_means,
    fields,
    nc1_by_svd,
    randn,
    same_bits,
    scattered,
    two_pass,
)
from torch import Tensor

from nc_dist.nc import ClassMoments
from nc_dist.nc.variability import nc1

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = st.sampled_from([torch.float32, torch.float64])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num=st.integers(1, 60),
    num_classes=st.integers(1, 9),
    dim=st.sampled_from([12, 140]),  # in one block of the scatter, and in two
    num_parts=st.integers(1, 8),
    dtype=DTYPES,
    data=st.data(),
)
def test_any_split_over_parts_or_ranks_in_any_order_is_one_process(
    seed, num, num_classes, dim, num_parts, dtype, data
) -> None:
    feats_BD, labels_B = scattered(seed, num, num_classes, dim)
    feats_BD = feats_BD.to(dtype)
    part_B = torch.tensor(data.draw(st.lists(st.integers(0, num_parts - 1), min_size=num, max_size=num)))
    parts = []
    for part in range(num_parts):
        rows = torch.tensor(data.draw(st.permutations((part_B == part).nonzero().flatten().tolist())), dtype=torch.long)
        parts.append(accumulated(feats_BD[rows], labels_B[rows], num_classes, batch=7, dtype=dtype))
    expected = two_pass(feats_BD, labels_B, num_classes)

    merged = reduce(ClassMoments.merge, data.draw(st.permutations(parts)))
    first, *others = [moments.statistics() for moments in all_reduced(parts)]

    for found in (merged.statistics(), first):
        assert_same(found, expected, TOLERANCE[dtype])
        if 1 < len(labels_B.unique()) < num:
            assert nc1(found) == pytest.approx(nc1_by_svd(expected), rel=TOLERANCE[dtype])
    assert all(same_bits(fields(first), fields(other)) for other in others)


def with_outliers(sizes: list[int], dim: int, sigma: float, times: float, seed: int) -> tuple[Tensor, Tensor]:
    """fp32 features; the first sample of every other class lies so many times as far from its mean as the others."""
    labels_B = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    firsts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    noise_BD = randn(seed + 1, len(labels_B), dim)
    noise_BD[firsts[::2]] *= times
    return (class_means(len(sizes), dim, seed)[labels_B] + sigma * noise_BD).float(), labels_B


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    sigma=st.sampled_from([1, 1e-2, 1e-4]),
    times=st.floats(1, 1e4),
    batch=st.sampled_from([1, 3, 16, 300]),
    num_parts=st.integers(1, 3),
)
def test_an_outlier_as_first_sample_of_a_class_costs_the_scatter_no_accuracy(
    seed, sizes, sigma, times, batch, num_parts
) -> None:
    feats_BD, labels_B = with_outliers(sizes, 24, sigma, times, seed)
    rows = [slice(part, None, num_parts) for part in range(num_parts)]
    parts = [accumulated(feats_BD[part], labels_B[part], len(sizes), batch) for part in rows]
    merged = reduce(ClassMoments.merge, parts)
    assert_same(merged.statistics(), two_pass(feats_BD, labels_B, len(sizes)), 1e-5)


@pytest.mark.parametrize("batch", [1, 16, 300])
@pytest.mark.parametrize("per_class", [3, 20])
@pytest.mark.parametrize(("sigma", "times"), [(1, 100), (1e-2, 1e4), (1e-3, 1e4), (1e-4, 1e4)])
def test_an_outlier_as_first_sample_of_a_class_costs_nc1_no_accuracy(sigma, times, per_class, batch) -> None:
    """Up to fifty times as far away as class means are: beyond that, rounding of its own square is felt in fp32."""
    feats_BD, labels_B = with_outliers([per_class] * 10, 64, sigma, times, seed=0)
    expected = nc1_by_svd(two_pass(feats_BD, labels_B, 10))
    assert nc1(accumulated(feats_BD, labels_B, 10, batch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch", [8, 64, 5000])
def test_a_pilot_that_is_an_outlier_is_left_behind(batch: int) -> None:
    """1e4 sigma aside, orthogonal to all else."""
    feats_BD, labels_B = scattered(0, 5000, 4, 24, sigma=1e-3)
    feats_BD[:, -1] = 0
    feats_BD[[int((labels_B == k).nonzero()[0]) for k in range(4)], -1] = 10
    feats_BD = feats_BD.float()
    moments = accumulated(feats_BD, labels_B, 4, batch)
    expected = two_pass(feats_BD, labels_B, 4)
    assert (moments.pilots_KD - expected.means_KD).norm(dim=1).max() < 1
    found = moments.statistics()
    assert nc1(found) == pytest.approx(nc1_by_svd(expected), rel=1e-6)
    assert_same(found, expected, 1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), dim=st.sampled_from([100, 129, 300]))
def test_upper_blocks_give_what_whole_matrices_give(seed: int, dim: int) -> None:
    feats_BD, labels_B = scattered(seed, 50, 5, dim)
    whole, blocks = (accumulated(feats_BD, labels_B, 5, 16, dtype=torch.float64, blocks=n).statistics() for n in (1, 8))
    assert_same(blocks, whole, 1e-12)
    assert nc1(blocks) == pytest.approx(nc1(whole), rel=1e-12)


@pytest.mark.parametrize("sigma", [1, 1e-2, 1e-4])
def test_nc1_of_long_tailed_ranks_with_missing_classes(sigma: float) -> None:
    """Classes on some ranks only, one rank empty; without the scatter between ranks it is off by percents."""
    feats_BD, labels_B = scattered(3, 1200, 20, 64, sigma)
    feats_BD = feats_BD.float()
    rank_B = torch.randint(4, (1200,), generator=torch.Generator().manual_seed(4))
    rank_B[(labels_B < 10) & (rank_B == 1)] = 2
    rank_B[labels_B == 19] = 3
    parts = [accumulated(feats_BD[rank_B == r], labels_B[rank_B == r], 20, batch=64) for r in range(5)]
    found = [nc1(moments) for moments in all_reduced(parts)]
    assert found == pytest.approx([nc1_by_svd(two_pass(feats_BD, labels_B, 20))] * 5, rel=1e-6)
    assert len(set(found)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_samples_and_classes_than_are_worked_on_at_a_time(dtype: torch.dtype) -> None:
    labels_B = torch.arange(13000) % 4500  # three parts of a batch, two of the classes
    feats_BD = (5 * randn(0, 4500, 20)[labels_B] + randn(1, 13000, 20)).to(dtype)
    moments = accumulated(feats_BD, labels_B, 4600, batch=13000, dtype=dtype)
    merged = accumulated(feats_BD[::2], labels_B[::2], 4600, dtype=dtype).merge(
        accumulated(feats_BD[1::2], labels_B[1::2], 4600, dtype=dtype)
    )
    expected = two_pass(feats_BD, labels_B, 4600)
    for found in (moments.statistics(), merged.statistics()):
        assert_same(found, expected, TOLERANCE[dtype])
        assert nc1(found) == pytest.approx(nc1_by_svd(expected), rel=TOLERANCE[dtype])


def test_the_error_of_fp32_products_does_not_grow_with_the_samples() -> None:
    """It would be 6e-5 if their buffer were never emptied."""
    feats_BD, labels_B = scattered(0, 200_000, 4, 8)
    feats_BD = feats_BD.float()
    assert_same(accumulated(feats_BD, labels_B, 4).statistics(), two_pass(feats_BD, labels_B, 4), 1e-6)


def test_all_reduce_makes_the_same_calls_on_an_empty_rank() -> None:
    def calls(moments: ClassMoments) -> list[tuple[tuple[int, ...], torch.dtype]]:
        seen = []
        moments.all_reduce(lambda tensor: seen.append((tuple(tensor.shape), tensor.dtype)) or tensor)
        return seen

    found = calls(accumulated(*scattered(0, 30, 4, 6), 4))
    assert found == calls(ClassMoments(4, 6))
    assert set(found) == {(shape, torch.float64) for shape in ((4,), (4, 6), (6,), (36,))}


def test_merge_changes_neither_part_and_goes_on() -> None:
    feats_BD, labels_B = scattered(7, 90, 5, 8)
    parts = [feats_BD[:30], feats_BD[30:60], feats_BD[60:]]
    first, second = (accumulated(parts[i], labels_B[30 * i :][:30], 5, dtype=torch.float64) for i in range(2))
    before = [first.state_dict(), second.state_dict()]
    merged = first.merge(second)
    merged.update(parts[2], labels_B[60:])
    assert_same(merged.statistics(), two_pass(feats_BD, labels_B, 5), 1e-12)
    assert same_bits(before[0], first.state_dict()) and same_bits(before[1], second.state_dict())


def test_all_reduce_leaves_this_ranks_own_moments_as_they_are() -> None:
    moments = accumulated(*scattered(7, 90, 5, 8), 5)
    before = moments.state_dict()
    reduced = moments.all_reduce(lambda tensor: tensor.mul_(3))  # as three ranks with the same samples, in place
    assert reduced.n_K.sum() == 270
    assert same_bits(before, moments.state_dict())


def test_pilots_are_the_first_samples_of_their_classes() -> None:
    """Not any sample: the bits of a result must not hang on how a scatter resolves duplicates."""
    feats_BD, _ = scattered(11, 18, 6, 8)
    labels_B = torch.arange(6).repeat(3)  # three of each: the first look at a pilot is at four
    moments = accumulated(feats_BD, labels_B + 1, 8, batch=7)
    assert torch.equal(moments.pilots_KD[1:7], feats_BD[:6].float())
    assert not moments.pilots_KD[[0, 7]].any()
