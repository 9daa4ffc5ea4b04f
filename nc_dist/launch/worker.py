"""Runs one journey in this process, whoever started it: joins the world, calls the journey, commits the result."""

from __future__ import annotations

import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nc_dist import finetune, measure, pretrain, pretrain_check, watchdog
from nc_dist.config import FinetuneRun, MeasureRun, PretrainRun
from nc_dist.errors import STATES, Terminated, exit_code
from nc_dist.launch import lease
from nc_dist.loop import At
from nc_dist.run_folder import STOP, appears, prepare, result_of, write_result, write_status
from nc_dist.spec import Spec
from nc_dist.world import World, joined_world


class Journey(NamedTuple):
    """A kind of run: what describes it, what finds its faults beforehand, what does it."""

    spec: type[Spec]
    check: Callable[..., dict[str, Any]]  # (run, world size[, cluster to plan for]) -> the plan; raises InputError
    run: Callable[[Any, World, Callable[[], bool], At], dict[str, Any]]  # (run, world, stop asked?, at) -> the result
    micro: Callable[[Any], int | None]  # of a step, which processes share evenly; None: any number of them will do
    changed: Callable[[Any, dict[str, Any]], str | None] = lambda run, result: None  # since then: why it is out of date
    leftovers: tuple[str, ...] = ()  # folders that go once the result is there: the export holds what is worth keeping


def micro_per_step(run: PretrainRun | FinetuneRun) -> int | None:
    """Into how many micro-batches a step is cut; None for a linear probe, which takes no steps."""
    if isinstance(run, FinetuneRun) and run.method.kind == "linear_probe":
        return None
    return run.batch.global_ // run.batch.micro


JOURNEYS = {
    "pretrain": Journey(PretrainRun, pretrain_check.check, pretrain.pretrain, micro_per_step),
    "finetune": Journey(
        FinetuneRun, finetune.check, finetune.finetune, micro_per_step, finetune.changed, ("checkpoints",)
    ),
    "measure": Journey(
        MeasureRun,
        measure.check,
        lambda run, world, stop, at: measure.measure(run, world, stop),
        lambda run: None,
        measure.changed,
    ),
}

_stop_asked: list[int] = []  # signals; an event or a lock could be held by the very code that a signal interrupts


def run_journey(
    name: str,
    spec: Any,
    owner: str | None = None,
    tell: Callable[[str], object] = print,
    hung: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """The result of the journey `name`; a finished run is not repeated: its result is returned at once.

    The result is committed after a barrier: when it is there, every rank is through. Rank 0 says for all whether it is
    there: another rank may look before rank 0 has moved an old folder aside. `owner` names this start of the run, which
    a restarted group shares; `tell` gets lines that are to be known beyond this process, `hung` the one that names what
    hangs. InputError when another group writes to the folder.
    """
    out, owner = Path(spec.out), owner or lease.owner()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(spec.launch.cpus)))
    with (
        joined_world(watchdog.longest(spec.launch.hang_s)) as world,
        lease.held(out, owner, tell) if world.rank == 0 else nullcontext(),
    ):
        if world.rank == 0:
            watchdog.clear(out)
        finished = world.broadcast(result_of(out) if world.rank == 0 else None)
        if finished is not None:
            return finished  # type: ignore[no-any-return]
        with watchdog.watching(out, world.rank, world.size, spec.launch.hang_s, hung or tell) as at:
            result = JOURNEYS[name].run(spec, world, _stop_request(out, world), at)
            world.barrier()
        if world.rank == 0:
            write_result(out, result)
            for left in JOURNEYS[name].leftovers:
                shutil.rmtree(out / left, ignore_errors=True)
        world.barrier()
    return result


def run_trial(run: FinetuneRun) -> dict[str, Any]:
    """A whole fine-tuning run with its folder and status, for sweeps."""
    out = prepare(run)
    write_status(out, "running", None)
    try:
        result = run_journey("finetune", run)
    except BaseException as error:
        code = exit_code(error)
        write_status(out, STATES[code], code, f"{type(error).__name__}: {error}")
        (out / "error.txt").write_text(traceback.format_exc())
        raise
    write_status(out, "done", 0)
    return result


def _stop_request(out: Path, world: World) -> Callable[[], bool]:
    """Whether this process got SIGTERM, or (looked at by rank 0) the run's stop file is there."""
    return lambda: bool(_stop_asked) or (world.rank == 0 and appears(out / STOP))


@contextmanager
def stopping_on_sigterm(also: Callable[[], object] = lambda: None) -> Iterator[None]:
    """SIGTERM and SIGUSR1 ask training to save and stop, instead of ending the process."""

    def ask(number: int, frame: object) -> None:
        _stop_asked.append(number)
        also()

    old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        _stop_asked.clear()
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM raises Terminated, so that what was begun is ended in order."""

    def end(number: int, frame: object) -> None:
        raise Terminated

    old = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
