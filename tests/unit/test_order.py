"""Which sample goes where: the same global batches at any number of ranks, every sample once, resumable anywhere."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nc_dist.data import order as orders
from nc_dist.data.order import Order, check_batch, check_world, default_lanes, eval_steps
from nc_dist.errors import InputError

# Shards, window: lanes of 800/16 = 50 samples, so that windows are smaller than, equal to and larger than a lane, and
# shards smaller and larger than one.
SHAPES = {
    "window below lane": ((20,) * 40, 2),
    "window equal to lane": ((25,) * 32, 2),
    "window above lane": ((40,) * 20, 4),
    "window of everything": ((100,) * 8, 100),
    "shard above lane": ((400, 400), 1),
    "one shard": ((807,), 4),
    "single files": ((1,) * 803, 4),
    "uneven": (tuple([3, 97, 1, 50, 149] * 2 + [205]), 3),
}


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    return np.stack([order.step(epoch, step) for step in range(order.steps_per_epoch)])


@pytest.mark.parametrize("sizes, window", SHAPES.values(), ids=SHAPES)
def test_an_epoch_has_every_sample_once_less_the_declared_tail(sizes: tuple[int, ...], window: int) -> None:
    order = Order(sizes, seed=3, global_batch=32, micro=4, lanes=16, window=window)
    seen = epoch_of(order, 0).ravel()
    assert len(set(seen.tolist())) == len(seen) == sum(sizes) - order.dropped
    assert seen.min() >= 0 and seen.max() < sum(sizes)
    assert order.dropped == sum(sizes) % 32


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    num_micro=st.integers(1, 6),
    lanes_of_micro=st.integers(1, 4),
    per_lane=st.integers(1, 3),
    window=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 1000),
)
def test_any_order_has_every_sample_at_most_once_and_the_same_at_every_world_size(
    sizes: list[int], num_micro: int, lanes_of_micro: int, per_lane: int, window: int, seed: int, epoch: int
) -> None:
    micro = lanes_of_micro * per_lane
    assume(sum(sizes) >= num_micro * micro)
    order = Order(tuple(sizes), seed, num_micro * micro, micro, num_micro * lanes_of_micro, window)
    batches = epoch_of(order, epoch)
    assert len(np.unique(batches)) == batches.size == sum(sizes) - order.dropped
    step = order.steps_per_epoch - 1
    for world in (w for w in range(1, num_micro + 1) if num_micro % w == 0):
        union = np.concatenate([order.rank_step(epoch, step, rank, world) for rank in range(world)])
        np.testing.assert_array_equal(union, batches[step])


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_together_have_the_same_batch_bit_for_bit_in_the_same_micro_batches(world: int) -> None:
    order = Order((100,) * 10, seed=5, global_batch=64, micro=8, lanes=32)
    for epoch, step in ((0, 0), (0, 14), (7, 3)):
        rows = [row for rank in range(world) for row in order.rank_step(epoch, step, rank, world)]
        assert np.stack(rows).tobytes() == order.step(epoch, step).tobytes()
        assert {len(row) for row in rows} == {8}


def test_a_micro_batch_takes_the_same_share_of_each_of_its_own_lanes() -> None:
    """Rank r owns adjacent lanes: micro-batch j of every step comes from lanes jL/M .. (j+1)L/M - 1."""
    order = Order((50,) * 12, seed=0, global_batch=24, micro=6, lanes=12)
    lanes = orders._epoch_line(order, 2).reshape(12, -1)
    lane_of = {int(position): lane for lane, row in enumerate(lanes) for position in row}
    for step in range(order.steps_per_epoch):
        for j, row in enumerate(order.step(2, step)):
            assert [lane_of[int(p)] for p in row] == [3 * j, 3 * j, 3 * j + 1, 3 * j + 1, 3 * j + 2, 3 * j + 2]


def test_a_step_reached_by_resuming_is_that_of_the_whole_run() -> None:
    """A fresh object, asked for one late step alone, without any of those before it."""
    order = Order((30,) * 9, 1, 16, 4, 8)
    whole = [epoch_of(order, epoch) for epoch in range(3)]
    np.testing.assert_array_equal(Order((30,) * 9, 1, 16, 4, 8).step(2, 11), whole[2][11])


def test_epochs_and_seeds_differ_and_drop_other_samples() -> None:
    order = Order((41,) * 5, seed=0, global_batch=32, micro=8, lanes=4)
    assert order.dropped == 13
    dropped = [frozenset(range(205)) - set(epoch_of(order, epoch).ravel().tolist()) for epoch in range(4)]
    assert len(set(dropped)) == 4 and all(len(left) == 13 for left in dropped)
    other = Order((41,) * 5, seed=1, global_batch=32, micro=8, lanes=4)
    assert not np.array_equal(epoch_of(order, 0), epoch_of(other, 0))


@pytest.mark.parametrize("window, most", [(1, 1), (3, 3), (100, 20)])
def test_a_window_bounds_how_many_shards_a_lane_reads_together(window: int, most: int) -> None:
    """10 steps of a lane touch one window's shards, and mix them."""
    order = Order((40,) * 20, seed=0, global_batch=8, micro=8, lanes=1, window=window)
    first = np.concatenate([order.step(0, step).ravel() for step in range(5)])
    shards = set((first // 40).tolist())
    assert len(shards) <= most
    assert len(shards) > 1 or window == 1


def test_class_sorted_shards_give_mixed_batches() -> None:
    """10 classes of 200 samples in 10 shards of one class each: every batch has most of the classes."""
    order = Order((200,) * 10, seed=0, global_batch=80, micro=10, lanes=default_lanes(80, 10), window=4)
    classes = [len(set((batch.ravel() // 200).tolist())) for batch in epoch_of(order, 0)]
    assert min(classes) >= 8


@pytest.mark.parametrize(
    "global_batch, micro, lanes",
    [(64, 32, 64), (64, 64, 64), (96, 32, 96), (8192, 64, 4096), (100, 50, 4), (30, 10, 6), (7, 7, 1), (6144, 1, 6144)],
)
def test_default_lanes_are_the_most_that_fit(global_batch: int, micro: int, lanes: int) -> None:
    assert default_lanes(global_batch, micro) == lanes
    check_batch(global_batch, micro, lanes)


@pytest.mark.parametrize("micro", [0, 24, 65, 128])
def test_a_micro_batch_that_does_not_divide_lists_those_that_do(micro: int) -> None:
    said = rf"batch.micro={micro}: must divide batch.global=64; possible: \[1, 2, 4, 8, 16, 32, 64\]"
    with pytest.raises(InputError, match=said):
        check_batch(64, micro, 64)
    with pytest.raises(InputError, match=said):
        default_lanes(64, micro)


@pytest.mark.parametrize("lanes", [0, 2, 6, 128])
def test_lanes_that_do_not_fit_list_those_that_do(lanes: int) -> None:
    with pytest.raises(InputError, match=rf"lanes={lanes}: .*possible: \[4, 8, 16, 32, 64\]"):
        Order((100,), 0, 64, 16, lanes)


@pytest.mark.parametrize("world", [0, 5, 8])
def test_a_world_that_does_not_divide_lists_those_that_do(world: int) -> None:
    with pytest.raises(InputError, match=rf"world size {world} .*12 micro-batches.*possible: \[1, 2, 3, 4, 6, 12\]"):
        check_world(12, world)
    with pytest.raises(InputError, match="possible"):
        Order((100,), 0, 48, 4, 12).rank_step(0, 0, 0, world)


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(InputError, match="batch.global=64: larger than the training set of 63 samples"):
        Order((31, 32), 0, 64, 64, 64)


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_epoch_is_an_error(step: int) -> None:
    with pytest.raises(IndexError):
        Order((10,), 0, 3, 3, 3).step(0, step)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 90), st.integers(1, 9), st.integers(1, 8))
def test_evaluation_has_each_position_on_one_rank_and_equal_counts_of_batches(n: int, batch: int, world: int) -> None:
    positions = np.arange(n) * 3
    ranks = [eval_steps(positions, batch, rank, world) for rank in range(world)]
    assert sorted(int(p) for rank in ranks for part in rank for p in part) == positions.tolist()
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(part) <= batch for rank in ranks for part in rank)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_an_evaluation_put_together_by_rank_is_in_the_order_of_one_process(world: int) -> None:
    parts = [np.concatenate(eval_steps(np.arange(23), 4, rank, world)) for rank in range(world)]
    assert np.concatenate(parts).tolist() == list(range(23))
