"""How many processes a group may have: pure arithmetic for elastic runs."""

from __future__ import annotations

from nc_dist.config import Workers
from nc_dist.errors import InputError


def allowed_sizes(workers: int | Workers, micro_per_step: int | None) -> list[int]:
    """The world sizes that `launch.workers` allows, ascending: within its bounds those that divide the micro-batches.

    `micro_per_step` None: any number will do. InputError when a range holds no possible size.
    """
    if isinstance(workers, int):
        return [workers]
    given = f"launch.workers={{min: {workers.min}, max: {workers.max}}}"
    if workers.min > workers.max:
        raise InputError(f"{given}: min must not be larger than max")
    within = range(workers.min, workers.max + 1)
    if micro_per_step is None:
        return list(within)
    sizes = [size for size in within if micro_per_step % size == 0]
    if not sizes:
        possible = [size for size in range(1, micro_per_step + 1) if micro_per_step % size == 0]
        raise InputError(
            f"{given}: no number in it divides the {micro_per_step} micro-batches of a step; possible: {possible}. "
            "Widen the bounds, or change batch.micro (which makes another run)"
        )
    return sizes


def size_of(started: int, sizes: list[int]) -> int:
    """How many of `started` processes train: the largest allowed size that there are enough for."""
    return max(size for size in sizes if size <= started)
