"""Class moments: any split, order and number of parts gives one result, in the precision of the features.

Letters: B samples, K classes, D dimensions.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nc_dist.nc import ClassMoments, Statistics, nc1

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def samples(seed, num, num_classes, dim, sigma=1.0, dtype=torch.float32):
    """Features about class means of norm 20, and labels of which some classes may lack samples."""
    random = torch.Generator().manual_seed(seed)
    means_KD = torch.randn(num_classes, dim, generator=random, dtype=torch.float64)
    means_KD *= 20 / means_KD.norm(dim=1, keepdim=True)
    labels_B = torch.randint(num_classes, (num,), generator=random)
    noise_BD = torch.randn(num, dim, generator=random, dtype=torch.float64)
    return (means_KD[labels_B] + sigma * noise_BD).to(dtype), labels_B


def two_pass(feats_BD: Tensor, labels_B: Tensor, num_classes: int) -> Statistics:
    """The definition, class by class, in fp64."""
    groups = [feats_BD[labels_B == k].double() for k in range(num_classes)]
    dim = feats_BD.shape[1]
    means = [group.mean(0) if len(group) else torch.zeros(dim, dtype=torch.float64) for group in groups]
    centred = [group - mean for group, mean in zip(groups, means, strict=True)]
    scatter_DD = torch.zeros(dim, dim, dtype=torch.float64)
    for residuals in centred:
        scatter_DD += residuals.T @ residuals
    within_K = torch.stack([residuals.square().sum() for residuals in centred])
    n_K = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    return Statistics(n_K, torch.stack(means), scatter_DD, within_K)


def accumulated(feats_BD, labels_B, num_classes, batch=None) -> ClassMoments:
    moments = ClassMoments(num_classes, feats_BD.shape[1])
    for start in range(0, len(feats_BD), batch or max(len(feats_BD), 1)):
        chunk = slice(start, start + (batch or len(feats_BD)))
        moments.update(feats_BD[chunk], labels_B[chunk])
    return moments


def all_reduced(parts: list[ClassMoments]) -> list[ClassMoments]:
    """One thread a rank; a barrier-based sum in rank order, so that every rank must make the same calls."""
    barrier, slots = threading.Barrier(len(parts), timeout=30), [torch.empty(0)] * len(parts)

    def reduce(rank: int) -> ClassMoments:
        def sum_fn(tensor: Tensor) -> Tensor:
            slots[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(torch.stack(slots).sum(0))
            barrier.wait()  # nobody overwrites a slot that another still reads
            return tensor

        return parts[rank].all_reduce(sum_fn)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(reduce, range(len(parts))))


def assert_same(found: Statistics, expected: Statistics, tolerance: float) -> None:
    assert torch.equal(found.n_K, expected.n_K)
    for name in ("means_KD", "scatter_DD", "within_K"):
        error = (getattr(found, name) - getattr(expected, name)).norm()
        assert error <= tolerance * getattr(expected, name).norm(), (name, float(error))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num=st.integers(1, 60),
    num_classes=st.integers(1, 9),
    num_parts=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_any_split_in_any_order_is_one_process(seed, num, num_classes, num_parts, dtype, data):
    feats_BD, labels_B = samples(seed, num, num_classes, dim=12, dtype=dtype)
    part_B = torch.tensor(data.draw(st.lists(st.integers(0, num_parts - 1), min_size=num, max_size=num)))
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    feats_BD, labels_B = feats_BD[order], labels_B[order]
    parts = [accumulated(feats_BD[part_B == p], labels_B[part_B == p], num_classes, batch=7) for p in range(num_parts)]
    expected = two_pass(feats_BD, labels_B, num_classes)

    merged = parts[0]
    for part in data.draw(st.permutations(parts[1:])):
        merged = merged.merge(part)
    reduced = [moments.statistics() for moments in all_reduced(parts)]

    assert_same(merged.statistics(), expected, TOLERANCE[dtype])
    assert_same(reduced[0], expected, TOLERANCE[dtype])
    for other in reduced[1:]:
        assert all(torch.equal(value, getattr(other, name)) for name, value in vars(reduced[0]).items())


@pytest.mark.parametrize("sigma", [1, 1e-2, 1e-4])
def test_nc1_of_long_tailed_ranks_with_missing_classes(sigma):
    """Classes on some ranks only, one rank empty; without the scatter between ranks it is off by percents."""
    feats_BD, labels_B = samples(3, 1200, 20, 64, sigma)
    rank_B = torch.randint(4, (1200,), generator=torch.Generator().manual_seed(4))
    rank_B[(labels_B < 10) & (rank_B == 1)] = 2
    rank_B[labels_B == 19] = 3
    parts = [accumulated(feats_BD[rank_B == r], labels_B[rank_B == r], 20, batch=64) for r in range(5)]
    value = nc1(two_pass(feats_BD, labels_B, 20)).value
    found = [nc1(moments.statistics()).value for moments in all_reduced(parts)]
    assert found == pytest.approx([value] * 5, rel=1e-6)
    assert len(set(found)) == 1


def test_all_reduce_makes_the_same_two_calls_on_an_empty_rank():
    def shapes_seen(moments: ClassMoments) -> list[tuple[int, ...]]:
        shapes = []
        moments.all_reduce(lambda tensor: shapes.append((tuple(tensor.shape), tensor.dtype)) or tensor)
        return shapes

    empty, full = ClassMoments(4, 6), accumulated(*samples(0, 30, 4, 6), 4)
    expected = [((4, 7), torch.float64), ((6 * 6 + 4,), torch.float64)]
    assert shapes_seen(empty) == shapes_seen(full) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_under_autocast_are_summed_in_fp32(dtype):
    feats_BD, labels_B = samples(5, 500, 4, 32, dtype=torch.float32)
    feats_BD = feats_BD.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = accumulated(feats_BD, labels_B, 4, batch=100).statistics()
    assert not stats.scatter_DD.requires_grad
    assert_same(stats, two_pass(feats_BD.detach(), labels_B, 4), 1e-6)


def test_fp32_under_autocast_and_int32_labels():
    feats_BD, labels_B = samples(6, 500, 4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = accumulated(feats_BD, labels_B.int(), 4).statistics()
    assert_same(stats, two_pass(feats_BD, labels_B, 4), 1e-6)


def test_merge_changes_neither_part_and_goes_on():
    feats_BD, labels_B = samples(7, 90, 5, 8, dtype=torch.float64)
    first, second = (
        accumulated(feats_BD[:30], labels_B[:30], 5),
        accumulated(feats_BD[30:60], labels_B[30:60], 5),
    )
    before = first.state_dict()
    merged = first.merge(second)
    merged.update(feats_BD[60:], labels_B[60:])
    assert_same(merged.statistics(), two_pass(feats_BD, labels_B, 5), 1e-12)
    assert all(torch.equal(before[name], value) for name, value in first.state_dict().items())


def test_state_dict_round_trip_is_bitwise_and_independent():
    feats_BD, labels_B = samples(8, 60, 5, 8)
    moments = accumulated(feats_BD[:40], labels_B[:40], 5)
    copy = ClassMoments.from_state_dict(moments.state_dict())
    for each in (moments, copy):
        each.update(feats_BD[40:], labels_B[40:])
    assert copy.n_K.sum() == 60
    assert all(torch.equal(copy.state_dict()[name], value) for name, value in moments.state_dict().items())


def test_damaged_state_is_refused():
    state = ClassMoments(3, 4).state_dict()
    with pytest.raises(ValueError, match="n_K is"):
        ClassMoments.from_state_dict({**state, "n_K": torch.zeros(2, dtype=torch.float64)})
    with pytest.raises(ValueError, match="squares_K is"):
        ClassMoments.from_state_dict({**state, "squares_K": state["squares_K"].float()})
    with pytest.raises(ValueError, match="expected"):
        ClassMoments.from_state_dict({name: value for name, value in state.items() if name != "sums_KD"})


def test_pilots_are_the_first_samples_of_their_classes():
    """Not any sample: the bits of a result must not hang on how a scatter resolves duplicates."""
    feats_BD, labels_B = samples(11, 80, 6, 8)
    moments = accumulated(feats_BD, labels_B + 1, 8, batch=9)
    for k in range(6):
        assert torch.equal(moments.pilots_KD[k + 1], feats_BD[labels_B == k][0].double())
    assert not moments.pilots_KD[[0, 7]].any()


def test_empty_batch_adds_nothing():
    moments = accumulated(*samples(9, 20, 3, 4), 3)
    before = moments.statistics()
    moments.update(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    assert_same(moments.statistics(), before, 0)


@pytest.mark.parametrize(
    ("feats", "labels", "message"),
    [
        (torch.ones(2, 4), torch.tensor([0, 3]), r"label 3 is outside 0\.\.2"),
        (torch.ones(2, 4), torch.tensor([-1, 0]), r"label -1 is outside 0\.\.2"),
        (torch.ones(2, 5), torch.tensor([0, 1]), r"features are \(2, 5\)"),
        (torch.ones(2, 4, dtype=torch.int64), torch.tensor([0, 1]), "floating"),
        (torch.ones(2, 4), torch.tensor([0, 1, 2]), r"labels are \(3,\)"),
        (torch.ones(2, 4), torch.tensor([0.0, 1.0]), "integers"),
        (torch.ones(2, 4), torch.tensor([True, False]), "integers"),
        (
            torch.tensor([[1, 2, torch.nan, torch.inf]]),
            torch.tensor([0]),
            "2 feature values are not finite, in 1",
        ),
        (torch.tensor([[0, 0, 0, 0], [0, 0, 0, 3e19]]), torch.tensor([0, 0]), "too large"),
    ],
)
def test_wrong_input_is_refused_and_nothing_added(feats, labels, message):
    moments = ClassMoments(3, 4)
    with pytest.raises(ValueError, match=message):
        moments.update(feats, labels)
    assert not any(sums.any() for sums in moments.state_dict().values())


def test_moments_of_other_sizes_do_not_merge():
    with pytest.raises(ValueError, match=r"\(3, 4\) with \(3, 5\)"):
        ClassMoments(3, 4).merge(ClassMoments(3, 5))
    with pytest.raises(ValueError, match="at least 1"):
        ClassMoments(0, 4)


def test_importing_nc_needs_torch_alone():
    code = (
        "import sys, nc_dist.nc; "
        "banned = 'ray deepspeed webdataset tensorboard pydantic nc_dist.world nc_dist.spec'.split(); "
        "print([name for name in banned if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
