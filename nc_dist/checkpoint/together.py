"""Work that several ranks depend on: a fault of one is known to all, so that nobody waits for one that is gone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from nc_dist.errors import InputError
from nc_dist.world import World

POLL_S = 5.0  # a sign of life to the ranks that wait: their collectives have a time-out

T = TypeVar("T")


class Faults(Exception):
    """What went wrong on which ranks."""


def on_all(world: World, work: Callable[[], T]) -> list[T]:
    """work() on every rank: what each of them got, in rank order, or Faults on all of them when one failed."""
    fault, done = None, None
    try:
        done = work()
    except Exception as error:
        fault = f"rank {world.rank}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    results = world.gather_objects((fault, done))
    faults = [fault for fault, _ in results if fault]
    if faults:
        raise Faults("; ".join(faults))
    return [done for _, done in results]


def on_first(world: World, work: Callable[[], T]) -> T:
    """work() of rank 0, or its InputError, on every rank; it may take as long as it likes."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if world.rank == 0 else None
        while world.broadcast(future is not None and bool(wait([future], POLL_S).not_done)):
            pass
        outcome: T | InputError | None = None
        if future is not None:
            try:
                outcome = future.result()
            except InputError as error:
                outcome = error
    outcome = world.broadcast(outcome)
    if isinstance(outcome, InputError):
        raise outcome
    return outcome
