"""A run that goes on with another number of ranks keeps its curve (torch engine, fp64; architecture.md 6b)."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
from processes import FP64, SMALL, curve, relative, run_ranks

from nc_dist.config import PretrainRun
from nc_dist.errors import Preempted
from nc_dist.pretrain import pretrain
from nc_dist.spec import load
from nc_dist.world import World

STAGES = ((4, 12), (2, 23), (1, 36), (2, 50))  # ranks, and the step they go on to


def go_on(world: World, out: Path, until: int) -> Any:
    """Train on from where the run is; the step at which it stopped, or its result."""
    asked = count(max(curve(out), default=0) + 1)
    try:
        return pretrain(load(PretrainRun, SMALL, [f"out={out}", *FP64["ce"]]), world, lambda: next(asked) >= until)
    except Preempted as stopped:
        return stopped.step


@pytest.mark.slow
def test_four_ranks_then_two_one_and_two_give_the_curve_of_one_process(
    one_process: dict[str, Path], tmp_path: Path
) -> None:
    for size, until in STAGES:
        found = run_ranks(go_on, size, tmp_path, until)
        assert until == 50 or found == [until] * size
    for key in ("train/loss", "train/grad_norm", "nc/train_before/nc1"):
        ours, theirs = curve(tmp_path, key), curve(one_process["ce"], key)
        assert ours.keys() == theirs.keys()
        assert max(relative(ours[step], theirs[step]) for step in ours) < 1e-9, key
