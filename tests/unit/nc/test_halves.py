"""Moments kept in two halves: the whole is their merge, and their gap says when n is too small for NC1.

Letters: B samples, K classes, D dimensions.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nc_reference import accumulated, assert_same, class_means, clusters, nc1_by_svd, same_bits, scattered, two_pass

from nc_dist.nc import HalvedMoments, Undefined
from nc_dist.nc.halves import occurrence
from nc_dist.nc.variability import GAP_LIMIT, nc1_split_half


def halved(feats_BD, labels_B, num_classes, batch=37, **options) -> HalvedMoments:
    moments = HalvedMoments(num_classes, feats_BD.shape[1], **options)
    for feats, labels in zip(feats_BD.split(batch), labels_B.split(batch), strict=True):
        moments.update(feats, labels)
    return moments


def gap(per_class: int) -> float:
    """Of features with noise as large as the distance of their classes."""
    moments = halved(*clusters(10, 64, per_class, 2.0), 10)
    return nc1_split_half(moments)


@given(labels=st.lists(st.integers(0, 5), max_size=40))
def test_occurrence_counts_earlier_samples_of_the_same_label(labels) -> None:
    expected = [labels[:row].count(label) for row, label in enumerate(labels)]
    assert occurrence(torch.tensor(labels, dtype=torch.long)).tolist() == expected


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_every_other_sample_of_a_class_is_in_the_second_half_whatever_the_batches(batch: int) -> None:
    feats_BD, labels_B = scattered(0, 300, 7, 5)
    rows = [(labels_B == k).nonzero().flatten() for k in range(7)]
    moments = halved(feats_BD, labels_B, 7, batch, dtype=torch.float64)
    for half, start in ((moments.first, 0), (moments.second, 1)):
        chosen = torch.cat([each[start::2] for each in rows])
        assert_same(half.statistics(), two_pass(feats_BD[chosen], labels_B[chosen], 7), 1e-12)


def test_the_halves_may_be_chosen() -> None:
    feats_BD, labels_B = scattered(0, 60, 4, 5)
    second_B = torch.arange(60) < 20
    moments = HalvedMoments(4, 5, dtype=torch.float64)
    moments.update(feats_BD, labels_B, second_B)
    assert_same(moments.first.statistics(), two_pass(feats_BD[20:], labels_B[20:], 4), 1e-12)
    assert_same(moments.second.statistics(), two_pass(feats_BD[:20], labels_B[:20], 4), 1e-12)


def test_the_whole_is_all_samples_also_after_merge_and_all_reduce() -> None:
    feats_BD, labels_B = scattered(0, 300, 7, 5)
    options = {"dtype": torch.float64}
    expected = two_pass(feats_BD, labels_B, 7)
    first, second = (halved(feats_BD[rows], labels_B[rows], 7, **options) for rows in (slice(90), slice(90, None)))
    before = first.first.state_dict()
    for moments in (halved(feats_BD, labels_B, 7, **options), first.merge(second)):
        assert_same(moments.statistics(), expected, 1e-12)
        assert_same(moments.whole().statistics(), expected, 1e-12)
        assert_same(moments.all_reduce(lambda tensor: tensor).statistics(), expected, 1e-12)
    assert same_bits(before, first.first.state_dict())
    assert_same(accumulated(feats_BD, labels_B, 7, **options).statistics(), expected, 1e-12)


def test_the_gap_is_the_relative_difference_of_the_unbiased_nc1() -> None:
    feats_BD, labels_B = clusters(5, 12, 20, 2.0)

    def unbiased(rows: slice) -> float:
        feats, labels = feats_BD[rows], labels_B[rows]
        return nc1_by_svd(two_pass(feats, labels, 5)) * len(labels) / (len(labels) - 5)

    # Classes come interleaved, so every other block of five is a half.
    order = torch.arange(100).view(20, 5)
    whole, halves = unbiased(slice(None)), [unbiased(order[start::2].flatten()) for start in (0, 1)]
    moments = halved(feats_BD, labels_B, 5, dtype=torch.float64)
    found = nc1_split_half(moments)
    assert found == pytest.approx(abs(sum(halves) / 2 - whole) / whole, rel=1e-9)


def test_the_gap_is_small_for_many_samples_and_large_for_few() -> None:
    assert gap(4000) < 0.01 < GAP_LIMIT < 0.1 < gap(4)


def test_too_few_samples_or_no_halves_have_no_gap() -> None:
    with pytest.raises(Undefined, match="two halves"):
        nc1_split_half(accumulated(*clusters(5, 12, 20, 2.0), 5))
    moments = halved(*clusters(5, 12, 2, 2.0), 5)
    with pytest.raises(Undefined, match="one sample a class"):
        nc1_split_half(moments)
    labels_B = torch.arange(5).repeat(4)
    moments = halved(class_means(5, 12)[labels_B].float(), labels_B, 5)
    with pytest.raises(Undefined, match="NC1 is zero"):
        nc1_split_half(moments)
