"""Killed at any step, stopped and gone on with at another number of processes: the curve is that of one process.

architecture.md 6b for plain torch in fp64, 6d for ZeRO in fp32.
"""

from __future__ import annotations

import random
import shutil
import signal
import statistics
from pathlib import Path

import pytest
from elastic import assert_samples_exact, ranks, step_of
from processes import FP64, SMALL, cli, curve, read_json, relative, run_ranks, said, wait_for

from nc_dist.config import PretrainRun
from nc_dist.errors import Preempted
from nc_dist.pretrain import pretrain
from nc_dist.run_folder import prepare
from nc_dist.spec import load
from nc_dist.world import World

pytestmark = pytest.mark.slow

STAGES = [f"zero{stage}" for stage in range(4)]
STEPS = 3  # at each number of processes
SEEDS = range(10, 15)


def assert_same_curve(out: Path, expected: Path) -> None:
    """Loss and gradient norm of each step, once, and NC1, to 1e-9."""
    for key in ("train/loss", "train/grad_norm", "nc/train_before/nc1"):
        found, whole = curve(out, key), curve(expected, key)
        assert len(curve(out)) == 50 and set(whole) <= set(found), "NC is measured besides at each stop"
        assert max(relative(found[step], whole[step]) for step in whole) < 1e-9, key


@pytest.mark.parametrize("seed", range(2))
def test_kill_9_of_a_rank_at_any_step_ends_the_group_and_the_same_command_goes_on(
    one_process: dict[str, Path], tmp_path: Path, seed: int
) -> None:
    chosen = random.Random(seed)
    step, victim = chosen.randrange(1, 45), seed % 2  # once the rank that writes, once another one
    out, command = tmp_path / "run", ["pretrain", SMALL, f"out={tmp_path / 'run'}", *FP64["ce"]]
    with ranks(tmp_path, 2, *command) as group:
        wait_for(lambda: step_of(out) >= step, 90, f"{step} steps", group[0][0])
        group[victim][0].kill()
        assert group[1 - victim][0].wait(60) in (1, 143), "the other one notices by itself"
    assert not (out / "result.json").exists()
    with ranks(tmp_path, 2, *command) as group:
        assert [process.wait(120) for process, _ in group] == [0, 0], group[0][1].read_text()[-4000:]
    assert_same_curve(out, one_process["ce"])
    assert not (out / "lease.json").exists()


def test_kill_9_of_the_only_process_and_the_same_command_again_at_once(
    one_process: dict[str, Path], tmp_path: Path
) -> None:
    out, command = tmp_path / "run", ["pretrain", SMALL, f"out={tmp_path / 'run'}", *FP64["ce"]]
    with ranks(tmp_path, 1, *command) as [(process, _)]:
        wait_for(lambda: step_of(out) >= 25, 90, "25 steps", process)
        process.kill()
        process.wait()
    assert read_json(out / "status.json")["state"] == "running" and (out / "lease.json").exists()
    done = cli(*command)
    assert done.returncode == 0 and "waiting" not in done.stdout, said(done)
    assert curve(out) == curve(one_process["ce"])


def test_a_run_goes_from_4_to_2_to_1_to_2_processes_on_the_curve_of_one(
    one_process: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = [f"out={out}", *FP64["ce"], "data.log_samples=true"]
    for size, until, number in ((4, 8, signal.SIGTERM), (2, 20, signal.SIGUSR1), (1, 30, signal.SIGTERM)):
        with ranks(tmp_path, size, "pretrain", SMALL, *settings) as group:
            wait_for(lambda until=until: step_of(out) >= until, 120, f"step {until} on {size}", group[0][0])
            group[-1][0].send_signal(number)  # one of them is asked, all stop
            assert [process.wait(60) for process, _ in group] == [75] * size, group[0][1].read_text()[-4000:]
        assert read_json(out / "status.json")["state"] == "preempted"
        assert (out / "checkpoints/last").resolve().name == f"step_{step_of(out)}"
    with ranks(tmp_path, 2, "pretrain", SMALL, *settings) as group:
        assert [process.wait(120) for process, _ in group] == [0, 0], group[0][1].read_text()[-4000:]
    assert_same_curve(out, one_process["ce"])
    assert_samples_exact(load(PretrainRun, SMALL, settings))


# --- ZeRO ------------------------------------------------------------------------------------------------------------


def run_of(out: Path, stage: str) -> PretrainRun:
    engine = ["engine.kind=deepspeed", f"engine.zero={stage[-1]}", "data.log_samples=true", "measure_every=1000"]
    return load(PretrainRun, SMALL, [f"out={out / stage}", "save_every=1000", *engine])


def some_steps(world: World, out: Path, copy: Path | None) -> None:
    """STEPS more steps of each stage's run, saved; then of a copy of it STEPS more."""
    for stage in STAGES:
        go_on(world, run_of(out, stage))
        if copy:
            if world.rank == 0:
                shutil.copytree(out / stage, copy / stage, symlinks=True)
            world.barrier()
            go_on(world, run_of(copy, stage))


def go_on(world: World, run: PretrainRun) -> None:
    """Train until asked for the STEPS-th time whether to stop."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= STEPS

    if world.rank == 0:
        prepare(run)
    world.barrier()
    with pytest.raises(Preempted):
        pretrain(run, world, stop)


def to_the_end(world: World, out: Path) -> dict[str, float]:
    """Held-out accuracy of each stage's run, gone on with to its end, and of whole runs with other seeds."""
    runs = {stage: run_of(out, stage) for stage in STAGES}
    for seed in SEEDS:
        runs[f"seed {seed}"] = load(PretrainRun, SMALL, [f"out={out}/{seed}", f"seed={seed}", "save_every=1000"])
    for run in runs.values():
        if world.rank == 0:
            prepare(run)
    world.barrier()
    return {name: pretrain(run, world, lambda: False)["heldout_accuracy"] for name, run in runs.items()}


@pytest.mark.timeout(900)
def test_zero_goes_from_4_to_2_to_1_to_2_processes(tmp_path: Path) -> None:
    """The next three losses are those of a copy that goes on as before, to 1e-5; each sample is read as ordered; the
    accuracy at the end is one that another seed could have had.
    """
    out, before = tmp_path / "run", None
    for size, copy in ((4, tmp_path / "4"), (2, tmp_path / "2"), (1, tmp_path / "1"), (2, None)):
        run_ranks(some_steps, size, out, copy, timeout=240)
        for stage in STAGES if before else ():
            found, expected = curve(out / stage), curve(before / stage)
            assert found.keys() == expected.keys()
            worst = max(relative(found[step], expected[step]) for step in sorted(found)[-STEPS:])
            print(f"{stage}, on {size} as before: {worst:.1e}")
            assert worst < 1e-5, f"{stage} on {size}"
        before = copy
    accuracy = run_ranks(to_the_end, 2, out, timeout=240)[0]
    seeds = [accuracy[f"seed {seed}"] for seed in SEEDS]
    print(accuracy)
    for stage in STAGES:
        assert_samples_exact(run_of(out, stage))
        assert abs(accuracy[stage] - statistics.mean(seeds)) <= 3 * statistics.stdev(seeds), (stage, accuracy)
