"""DeepSpeed's checkpoints at another number of ranks, 4 -> 2 -> 1 -> 2, in every stage (architecture.md 6 c, d)."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import relative, run_ranks
from small_engines import averages, losses, small_engine, small_model, trained, weights, whole_state, worst

from nc_dist.errors import InputError
from nc_dist.world import World

CASES = [(0, "sgd"), *product((1, 2, 3), ("sgd", "adamw"))]
LR = {"sgd": 0.02, "adamw": 1e-3}
AHEAD = 3


def state(engine: Any, world: World) -> dict[str, torch.Tensor]:
    kept = {f"average of {name}": value for name, value in averages(engine).items()}
    return whole_state(engine, world) | weights(engine) | kept


def leg(world: World, folder: Path, start: int, stop: int) -> dict[Any, Any]:
    """Load what was saved at `start`, go on to `stop`, save, then look ahead. By case: state and losses after the load,
    state at the save and the losses after it; at first, whether a new engine at the same size goes on bit for bit.
    """
    found: dict[Any, Any] = {}
    for zero, optim in CASES:
        old, new = (folder / f"{zero}_{optim}_{step}" for step in (start, stop))
        new.mkdir(exist_ok=True)
        engine = small_engine(world, zero, optim, ema=0.9)
        after_load = ahead = None
        if start:
            assert engine.load(old) == {"step": start}
            after_load = state(engine, world)
            ahead = losses(trained(engine, world, start, start + AHEAD, lr=LR[optim]))
            assert engine.load(old) == {"step": start}  # also into an engine that has gone on
            assert worst(state(engine, world), after_load) == 0
        trained(engine, world, start, stop, lr=LR[optim])
        written = world.gather_objects(engine.save(new, {"step": stop}))
        assert sorted(sum(written, [])) == sorted(path for path in new.rglob("*") if path.is_file())
        saved = state(engine, world)
        expected = losses(trained(engine, world, stop, stop + AHEAD, lr=LR[optim]))
        bitwise = None
        if not start:
            again = small_engine(world, zero, optim, ema=0.9, model=small_model(seed=7))
            again.load(new)
            same = losses(trained(again, world, stop, stop + AHEAD, lr=LR[optim]))
            bitwise = same == expected and worst(weights(again), weights(engine)) == 0
        found[zero, optim] = after_load, ahead, saved, expected, bitwise
    return found


@pytest.mark.slow
def test_four_ranks_then_two_one_and_two_keep_weights_moments_and_averages_in_every_stage(tmp_path: Path) -> None:
    before: dict[Any, Any] = {}
    for size, start, stop in ((4, 0, 3), (2, 3, 5), (1, 5, 7), (2, 7, 9)):
        ranks = run_ranks(leg, size, tmp_path, start, stop, timeout=300)
        for found, case in product(ranks, CASES):
            after_load, ahead, _, _, bitwise = found[case]
            assert bitwise is not False, (size, case)
            if start:
                assert worst(after_load, before[case][2]) == 0, (size, case)
                apart = max(map(relative, ahead, before[case][3]))
                assert apart < 1e-5, (size, case, apart)
        before = ranks[0]


def refused(world: World, folder: Path) -> list[str]:
    """What is said when a checkpoint of stage 2 is to be gone on with in another stage."""
    saving = small_engine(world, 2)
    saving.save(folder, {})
    said = []
    for zero in (0, 1, 3):
        with pytest.raises(InputError) as refusal:
            small_engine(world, zero).load(folder)
        said.append(str(refusal.value))
    return said


@pytest.mark.slow
def test_another_stage_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for said in run_ranks(refused, 1, tmp_path)[0]:
        assert "is of ZeRO stage 2" in said and "engine.zero=2" in said and "model.backbone.weights" in said
