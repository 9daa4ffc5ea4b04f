"""Runs one journey in this process, whoever started it: joins the world, calls the journey, commits the result."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nc_dist.config import FinetuneRun, MeasureRun, PretrainRun
from nc_dist.errors import exit_code
from nc_dist.run_folder import STOP, prepare, result_of, write_result, write_status
from nc_dist.spec import Spec
from nc_dist.world import World, joined_world

SPECS: dict[str, type[Spec]] = {"pretrain": PretrainRun, "finetune": FinetuneRun, "measure": MeasureRun}

_stop_asked = threading.Event()


def run_journey(name: str, spec: Spec) -> dict[str, Any]:
    """The result of the journey `name`; a finished run is not repeated: its result is returned at once.

    The result is committed after a barrier: when it is there, every rank is through.
    """
    out = Path(spec.out)  # type: ignore[attr-defined]
    finished = result_of(out)
    if finished is not None:
        return finished
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(spec.launch.cpus)))  # type: ignore[attr-defined]
    with joined_world() as world:
        result = _call(name, spec, world)
        world.barrier()
        if world.rank == 0:
            write_result(out, result)
        world.barrier()
    return result


def _call(name: str, spec: Spec, world: World) -> dict[str, Any]:
    if isinstance(spec, PretrainRun):
        from nc_dist.pretrain import pretrain

        return pretrain(spec, world, stop_request(spec, world))
    if isinstance(spec, FinetuneRun):
        from nc_dist.finetune import finetune

        return finetune(spec, world, stop_request(spec, world))
    assert isinstance(spec, MeasureRun), name
    from nc_dist.measure import measure

    return measure(spec, world)


def run_trial(run: FinetuneRun) -> dict[str, Any]:
    """A whole fine-tuning run with its folder and status, for sweeps."""
    out = prepare(run)
    write_status(out, "running", None)
    try:
        result = run_journey("finetune", run)
    except BaseException as error:
        write_status(out, "failed", exit_code(error), f"{type(error).__name__}: {error}")
        raise
    write_status(out, "done", 0)
    return result


def stop_request(spec: Any, world: World) -> Callable[[], bool]:
    """Whether this process got SIGTERM, or (looked at by rank 0) the run's stop file is there."""
    file = Path(spec.out) / STOP
    return lambda: _stop_asked.is_set() or (world.rank == 0 and file.exists())


@contextmanager
def stopping_on_sigterm(also: Callable[[], object] = lambda: None) -> Iterator[None]:
    """SIGTERM and SIGUSR1 ask training to save and stop, instead of ending the process."""

    def ask(number: int, frame: object) -> None:
        _stop_asked.set()
        also()

    old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        _stop_asked.clear()
        for number, handler in old.items():
            signal.signal(number, handler)
