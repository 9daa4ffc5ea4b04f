"""What the tests with real processes share: gloo ranks, the command line, torchrun, a Ray head, and reading of runs.

Every process has a hard time limit and is ended by its id, with its children; its traceback is shown.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in every child

import multiprocessing

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "tests/small.yaml"
FP64 = {  # the runs of the golden curves; each clips on a fifth of its steps or more
    "ce": ["engine.precision=fp64"],
    "supcon": ["engine.precision=fp64", "loss.kind=supcon", "model.head.kind=mlp", "engine.clip=0.2"],
}
OURS = ("RAY_ADDRESS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Parity is stated for CPUs; a machine with a GPU runs the same tests in the same way.
QUIET = {"CUDA_VISIBLE_DEVICES": "", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}

Json = dict[str, Any]


def child_env(**extra: str) -> dict[str, str]:
    """The environment of a test's child: nothing of a cluster or process group that the tests themselves run under."""
    return {**{k: v for k, v in os.environ.items() if k not in OURS}, **QUIET, **extra}


def end(pid: int, grace: float = 10) -> None:
    """End a process and all that it started, by their ids."""
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    family = [*parent.children(recursive=True), parent]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=grace)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10)


def wait_for(
    condition: Callable[[], Any], timeout: float, what: str, alive: subprocess.Popen[Any] | None = None
) -> Any:
    """The first true value of `condition`; fails after `timeout` seconds, or when the process `alive` has ended."""
    ends = time.monotonic() + timeout
    while time.monotonic() < ends:
        if value := condition():
            return value
        if alive is not None and alive.poll() is not None:
            pytest.fail(f"the process ended with {alive.returncode} before: {what}")
        time.sleep(0.05)
    pytest.fail(f"not within {timeout:g} s: {what}")


# --- ranks -----------------------------------------------------------------------------------------------------------


def _rank_main(fn: Callable[..., Any], rank: int, n: int, folder: str, ends: float, args: tuple[Any, ...]) -> None:
    own = Path(folder) / str(rank)
    log = own.with_suffix(".log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(max(0.1, ends - time.time() - 2), file=log)  # where a hanging rank hangs
    os.environ.update(QUIET, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from nc_dist.world import World

    try:
        torch.set_num_threads(1)
        store = dist.FileStore(f"{folder}/store", n)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=600))
        own.with_suffix(".pickle").write_bytes(pickle.dumps(fn(World(rank, n), *args)))
        dist.barrier()
    except BaseException:
        traceback.print_exc(file=log)
        log.flush()
        os._exit(1)
    log.flush()
    os._exit(0)


def run_ranks(fn: Callable[..., Any], n: int, *args: Any, timeout: float = 120) -> list[Any]:
    """fn(world, *args) on n gloo ranks, started by spawn; the list of what they return. Both must be picklable."""
    spawn = multiprocessing.get_context("spawn")
    ends = time.time() + timeout
    with tempfile.TemporaryDirectory(prefix="nc-ranks-") as folder:
        ranks = [spawn.Process(target=_rank_main, args=(fn, r, n, folder, ends, args)) for r in range(n)]
        for process in ranks:
            process.start()
        while any(p.is_alive() for p in ranks) and time.time() < ends:
            if any(p.exitcode for p in ranks):
                ends = min(ends, time.time() + 2)  # the others wait for one that is gone
            time.sleep(0.02)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            if process.pid and process.is_alive():
                with suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(process.pid).children():
                        end(child.pid, grace=0.5)
                process.kill()
            process.join()
        if any(code != 0 for code in codes):
            logs = (f"--- rank {r}, exit code {code}\n{_read(folder, r)}" for r, code in enumerate(codes))
            pytest.fail(f"of {n} ranks in {timeout} s (exit code None: did not end)\n" + "\n".join(logs))
        return [pickle.loads((Path(folder) / f"{r}.pickle").read_bytes()) for r in range(n)]


def _read(folder: str, rank: int) -> str:
    path = Path(folder) / f"{rank}.log"
    return path.read_text(errors="replace")[-6000:] if path.exists() else "(no output)"


# --- commands --------------------------------------------------------------------------------------------------------


def run_command(command: Sequence[str], timeout: float, **env: str) -> subprocess.CompletedProcess[str]:
    """Run to the end in the repository's root; a command that takes longer fails the test with what it said."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, cwd=ROOT, env=child_env(**env), start_new_session=True
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
        finally:
            late = process.poll() is None
            if late:
                end(process.pid)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    if late:
        pytest.fail(f"still running after {timeout} s: {' '.join(command)}\n{texts[0][-4000:]}\n{texts[1][-6000:]}")
    return subprocess.CompletedProcess(list(command), process.returncode, *texts)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """All that a command said, for the message of an assertion."""
    return f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"


def cli(*args: object, timeout: float = 90, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`nc-dist` as a user runs it."""
    return run_command([sys.executable, "-m", "nc_dist", *map(str, args)], timeout, **(env or {}))


def torchrun(n: int, *args: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """The same in n processes on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return run_command([*launcher, f"--nproc-per-node={n}", "-m", "nc_dist", *map(str, args)], timeout)


@dataclass(frozen=True)
class Head:
    """A Ray head of the tests' own: its process, what a client's environment needs, and its output."""

    process: subprocess.Popen[bytes]
    env: dict[str, str]
    log: Path

    def workers(self, title: str) -> list[psutil.Process]:
        """Its processes whose title begins so."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on just now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def started(log: Path, *args: object, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """`nc-dist` going on while the block runs; ended with all its children afterwards."""
    command = [sys.executable, "-m", "nc_dist", *map(str, args)]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=child_env(**(env or {})), stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        end(process.pid)


# --- what runs leave behind ------------------------------------------------------------------------------------------


def rows(out: Path) -> list[Json]:
    """The whole rows of a run's metrics.jsonl; also of one that is still going on."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def curve(out: Path, key: str = "train/loss") -> dict[int, float]:
    """Step to value; a step that was written twice fails."""
    found = [(row["step"], row[key]) for row in rows(out) if key in row]
    assert len(dict(found)) == len(found), f"{out}: doubled steps in {[step for step, _ in found]}"
    return dict(found)


def read_json(path: Path) -> Json:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def relative(a: float, b: float) -> float:
    """The larger relative difference of two numbers."""
    return abs(a - b) / max(abs(a), abs(b), 1e-300)


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything in a folder, to see that nothing was made, changed or lost."""
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}
