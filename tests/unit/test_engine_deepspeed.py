"""DeepSpeed on paper: its configuration, shards cut anew, the loss scale. Its steps: tests/dist/test_zero_*.py."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_dist.engine import DeepSpeedSpec, deepspeed_json
from nc_dist.engine.loss_scale import PATIENCE, LossScale
from nc_dist.engine.zero_shards import AVERAGES, WEIGHTS, Piece, Shard, cut_anew, read_shards, save_shard


def zero_of(parameters: int, gpu: bool = False, **spec: Any) -> dict[str, Any]:
    written = deepspeed_json(DeepSpeedSpec.model_validate(spec), 64, 8, 2, parameters, gpu)
    return written["zero_optimization"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("parameters", "bucket"), [(20_000, 2**20), (80_000_000, 10_000_000), (10**10, 2**26)])
def test_buckets_are_an_eighth_of_the_parameters_within_bounds(parameters: int, bucket: int) -> None:
    zero = zero_of(parameters, zero=2)
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket
    assert "stage3_prefetch_bucket_size" not in zero


def test_stage_three_keeps_small_parameters_and_a_quarter_of_the_others() -> None:
    zero = zero_of(80_000_000, zero=3)
    assert zero["stage3_param_persistence_threshold"] == 80_000
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 20_000_000
    assert zero_of(10**9, zero=3)["stage3_param_persistence_threshold"] == 100_000


@pytest.mark.parametrize("gpu", [False, True])
def test_overlap_and_pinned_memory_are_for_gpus(gpu: bool) -> None:
    assert [zero_of(10**6, gpu, zero=stage)["overlap_comm"] for stage in range(4)] == [False, False, gpu, gpu]
    offload = {"device": "cpu", "pin_memory": gpu}
    zero = zero_of(10**6, gpu, zero=3, offload_optimizer=True, offload_parameters=True)
    assert (zero["offload_optimizer"], zero["offload_param"]) == (offload, offload)
    assert not {"offload_optimizer", "offload_param"} & zero_of(10**6, gpu, zero=3).keys()


# --- shards ----------------------------------------------------------------------------------------------------------


def cut(sizes: list[int], world: int, together: bool) -> list[Shard]:
    """Parameters of these sizes over `world` processes, in two flat tensors: cut as one (ZeRO 1, 2) or one by one (3).

    Element i of parameter p is p + i/1000 as a weight, the negative as a momentum; padding is 99.
    """
    shards = [({}, [[], []]) for _ in range(world)]  # type: ignore[var-annotated]
    for flat in (0, 1):
        own = range(flat, len(sizes), 2)
        total = sum(sizes[p] for p in own)
        begin = 0
        for p in own:
            for rank, (pieces, flats) in enumerate(shards):
                part = -(-total // world) if together else -(-sizes[p] // world)
                first = rank * part - begin if together else rank * part
                lo, hi = max(0, first), min(sizes[p], first + part)
                if lo < hi:
                    pieces[f"p{p}"] = Piece(flat, len(flats[flat]), lo, hi - lo)
                    flats[flat] += [p + i / 1000 for i in range(lo, hi)]
            begin += sizes[p]
        longest = max(len(flats[flat]) for _, flats in shards)
        for _, flats in shards:
            flats[flat] += [99.0] * (longest - len(flats[flat]))
    return [Shard(pieces, [_flat(values) for values in flats]) for pieces, flats in shards]


def _flat(values: list[float]) -> dict[str, Any]:
    weights = torch.tensor(values, dtype=torch.float64)
    return {WEIGHTS: weights, "momentum_buffer": -weights, "step": torch.tensor(5.0), AVERAGES: weights + 0.5}


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_shards_cut_anew_for_any_number_of_processes_are_those_that_they_would_have_saved(
    sizes: list[int], before: int, after: int, together: bool
) -> None:
    old, expected = cut(sizes, before, together), cut(sizes, after, together)
    members = [[f"p{p}" for p in range(flat, len(sizes), 2)] for flat in (0, 1)]
    for own in expected:
        lengths = [len(flat[WEIGHTS]) for flat in own.flats]
        for found, right in zip(cut_anew(own.pieces, members, lengths, old), own.flats, strict=True):
            kept = right[WEIGHTS] != 99
            assert found.keys() == right.keys() and found["step"] == 5
            for key in (WEIGHTS, "momentum_buffer", AVERAGES):
                assert found[key].equal(torch.where(kept, right[key], 0))


def test_shards_survive_their_files_and_a_missing_one_is_noticed(tmp_path: Path) -> None:
    shards = cut([5, 4, 3], 3, together=True)
    for rank, shard in enumerate(shards):
        save_shard(shard, tmp_path / f"{rank}.pt")
    back = read_shards(sorted(tmp_path.glob("*.pt")))
    assert [shard.pieces for shard in back] == [shard.pieces for shard in shards]
    own, members = cut([5, 4, 3], 1, together=True)[0], [["p0", "p2"], ["p1"]]
    (first, _) = cut_anew(own.pieces, members, [8, 4], back)
    assert first[WEIGHTS].equal(own.flats[0][WEIGHTS])
    with pytest.raises(ValueError, match=r"the checkpoint has \d of \d elements of p\d"):
        cut_anew(own.pieces, members, [8, 4], back[:2])


# --- loss scale ------------------------------------------------------------------------------------------------------


def test_the_loss_scale_halves_at_once_and_doubles_after_a_long_time() -> None:
    scale = LossScale(used=True)
    scale.update(False)
    assert scale.value == 2.0**15
    seen = []
    for _ in range(2 * PATIENCE):
        scale.update(True)
        seen.append(scale.value)
    grown = [n for n, (a, b) in enumerate(pairwise([2.0**15, *seen]), 1) if b == 2 * a]
    assert grown == [PATIENCE, 2 * PATIENCE]
    other = LossScale(used=True)
    other.restore(**scale.state())
    assert other == scale
