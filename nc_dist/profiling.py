"""What the processes do during a few steps, on demand: torch's profiler around them, one Chrome trace a rank."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from nc_dist.errors import InputError
from nc_dist.world import World

FOLDER = "profile"
T = TypeVar("T")


def steps_of(asked: str | None, steps: int) -> range:
    """The step numbers, from 1, that profile.steps=first:last+1 names; empty for None. InputError unless they exist."""
    if asked is None:
        return range(0)
    first, end = map(int, asked.split(":"))
    if not 1 <= first < end <= steps + 1:
        raise InputError(
            f"profile.steps={asked}: steps {first} to {end - 1}, of a run with steps 1 to {steps}; 10:20 means 10 to 19"
        )
    return range(first, end)


def profiled(steps: Iterator[T], asked: range, start: int, out: Path, world: World) -> Iterator[T]:
    """The same steps, of which the first is number start + 1; those that are asked for are recorded as they are taken.

    What the caller does between them is in the trace too: out/profile/rank_R.json, for chrome://tracing or Perfetto.
    Steps that an earlier attempt has taken are not recorded, and nothing is written where none is left.
    """
    first = max(asked.start, start + 1)
    if first < asked.stop:
        yield from islice(steps, first - start - 1)
        path = out / FOLDER / f"rank_{world.rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        with profile(
            activities=[ProfilerActivity.CPU, *cuda],
            record_shapes=True,
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        ):
            yield from islice(steps, asked.stop - first)
    yield from steps
