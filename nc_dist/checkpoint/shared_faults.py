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
    except Faults:
        raise  # known to all ranks already: the work shares its faults itself
    except Exception as error:
        fault = _line(world, error)
    results = world.gather_objects((fault, done))
    faults = [fault for fault, _ in results if fault]
    if faults:
        raise Faults("; ".join(faults))
    return [done for _, done in results]


def on_first(world: World, work: Callable[[], T]) -> T:
    """work() of rank 0, or its error, on every rank; it may take longer than the others' collectives would wait.

    Rank 0 works in a thread, and sends a sign of life every POLL_S. What it got must be picklable; an error that is no
    InputError is Faults on the others, as not every error can be sent.
    """
    if world.size == 1:
        return work()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if world.rank == 0 else None
        while world.broadcast(future is not None and bool(wait([future], POLL_S).not_done)):
            pass
    error = future.exception() if future is not None else None
    told = error and (InputError(str(error)) if isinstance(error, InputError) else Faults(_line(world, error)))
    done, told = world.broadcast((future.result() if future is not None and error is None else None, told))
    world.barrier()  # rank 0 may end now: all have its news
    if told is not None:
        raise error or told
    return done  # type: ignore[no-any-return]


def _line(world: World, error: BaseException) -> str:
    return f"rank {world.rank}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
