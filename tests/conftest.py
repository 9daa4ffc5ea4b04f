"""What the tests with real processes share: gloo ranks, the command line, torchrun, small shards and a finished run.

Every process has a hard time limit and is ended by its id, with its children; its traceback is shown.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in every child

import multiprocessing

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "tests/small.yaml"
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
        with_gone(process.terminate)
    _, alive = psutil.wait_procs(family, timeout=grace)
    for process in alive:
        with_gone(process.kill)
    psutil.wait_procs(alive, timeout=10)


def with_gone(call: Callable[[], object]) -> None:
    """Call it; that the process is gone already is fine."""
    try:
        call()
    except psutil.NoSuchProcess:
        pass


def wait_for(condition: Callable[[], Any], timeout: float, what: str, alive: subprocess.Popen[Any] | None = None) -> Any:
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


def _rank_main(fn: Callable[..., Any], rank: int, n: int, folder: str, timeout: float, args: tuple[Any, ...]) -> None:
    own = Path(folder) / str(rank)
    log = own.with_suffix(".log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(max(1, timeout - 3), file=log)  # where a hanging rank hangs
    os.environ.update(QUIET, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    import pickle
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from nc_dist.world import World

    try:
        torch.set_num_threads(1)
        store = dist.FileStore(f"{folder}/store", n)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=timeout))
        own.with_suffix(".pickle").write_bytes(pickle.dumps(fn(World(rank, n), *args)))
        dist.barrier()
    except BaseException:
        traceback.print_exc(file=log)
        log.flush()
        os._exit(1)
    log.flush()
    os._exit(0)


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """run_ranks(fn, n, *args, timeout=60): fn(world, *args) on n gloo ranks; the list of what they return."""

    def run(fn: Callable[..., Any], n: int, *args: Any, timeout: float = 60) -> list[Any]:
        import pickle

        spawn = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory(prefix="nc-ranks-") as folder:
            ranks = [spawn.Process(target=_rank_main, args=(fn, r, n, folder, timeout, args)) for r in range(n)]
            for process in ranks:
                process.start()
            ends = time.monotonic() + timeout
            while any(p.is_alive() for p in ranks) and time.monotonic() < ends:
                if any(p.exitcode for p in ranks):
                    ends = min(ends, time.monotonic() + 2)  # the others wait for one that is gone
                time.sleep(0.02)
            codes = [process.exitcode for process in ranks]
            for process in ranks:
                if process.pid and process.is_alive():
                    end(process.pid, grace=0.5)
                process.join()
            if any(code != 0 for code in codes):
                logs = (f"--- rank {r}, exit code {code}\n{_read(folder, r)}" for r, code in enumerate(codes))
                pytest.fail(f"{n} ranks, exit code None: still running after {timeout} s\n" + "\n".join(logs))
            return [pickle.loads((Path(folder) / f"{r}.pickle").read_bytes()) for r in range(n)]

    return run


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
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
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


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """cli(*args, timeout=90, env={}): `nc-dist` as a user runs it."""

    def run(*args: object, timeout: float = 90, env: dict[str, str] | None = None) -> Any:
        return run_command([sys.executable, "-m", "nc_dist", *map(str, args)], timeout, **(env or {}))

    return run


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """torchrun(n, *args, timeout=120): the same in n processes on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]

    def run(n: int, *args: object, timeout: float = 120, env: dict[str, str] | None = None) -> Any:
        command = [*launcher, f"--nproc-per-node={n}", "-m", "nc_dist", *map(str, args)]
        return run_command(command, timeout, **(env or {}))

    return run


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


# --- data and a finished run -----------------------------------------------------------------------------------------

UNEVEN = (60, 45, 40, 36, 33, 30, 28, 25, 23, 20)  # samples of each digit


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """340 digits in four shards, the classes uneven."""
    from nc_dist.data import shards
    from nc_dist.data.catalog import open_source

    source = open_source("digits:train")
    chosen = [np.flatnonzero(source.labels == k)[:n] for k, n in enumerate(UNEVEN)]
    out = tmp_path_factory.mktemp("data") / "uneven"
    for _ in shards.build(source, out, samples_per_shard=90, positions=np.sort(np.concatenate(chosen))):
        pass
    return out


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, small_shards: Path, cli: Any) -> Iterator[Path]:
    """A small pre-trained model, torch engine, one process; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "source"
    done = cli("pretrain", SMALL, f"out={out}", f"data.train={small_shards}", "epochs=4", "--on", "here")
    assert done.returncode == 0, said(done)
    yield out
