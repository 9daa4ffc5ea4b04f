#!/usr/bin/env python3
"""Times training steps of nc_dist beside a bare PyTorch DDP loop, taking turns in one run; prints one table of ratios.

    .venv/bin/python tools/bench_train.py                  # resnet20 on two CPU ranks; half an hour
    .venv/bin/python tools/bench_train.py --quick          # whether all of it runs; the numbers say nothing
    .venv/bin/python tools/bench_train.py --only steps     # without the whole journeys

First table: the bare loop and ours with each engine train equal networks in the same two processes on the same images
in memory, a block of steps each in turn; a ratio is that of a block to the bare block of the same round and the same
accumulation, its median over rounds stands beside the lowest and the highest. Clipping is off on all sides.
Second table: whole journeys as a user starts them, under torchrun and on Ray, data loading and logging included,
beside the bare loop of the first table in processes of its own; and what the probe of NC adds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from nc_dist.backbones import SmallResNetSpec
from nc_dist.data.augment import InputSpec, normalise
from nc_dist.data.stream import Batch
from nc_dist.engine import DeepSpeedSpec, TorchSpec
from nc_dist.engine.make import make_engine
from nc_dist.loop import train_steps
from nc_dist.losses import CrossEntropy
from nc_dist.model import Model, ModelSpec
from nc_dist.objective import Objective
from nc_dist.optim import SGD, Schedule
from nc_dist.world import World, joined_world

RANKS, CLASSES, SIZE, STEPS = 2, 10, 32, 10**6
JOURNEYS, PROBE_EVERY = ("torch", "zero 1"), 200
ROOT = Path(__file__).parents[1]
ENGINES = {"torch": TorchSpec()} | {f"zero {stage}": DeepSpeedSpec(zero=stage) for stage in range(4)}
Block = Callable[[], None]  # trains a few steps


def network(width: int) -> Model:
    torch.manual_seed(0)
    return Model(ModelSpec(backbone=SmallResNetSpec(name="resnet20", width=width)), CLASSES)


def micro_batches(micro: int, own: int, rank: int) -> Iterator[list[Batch]]:
    """The micro-batches of this rank's steps: ever the same few images, in memory."""
    random = torch.Generator().manual_seed(rank)
    images = torch.randint(0, 256, (own, micro, 3, SIZE, SIZE), dtype=torch.uint8, generator=random)
    labels = torch.randint(0, CLASSES, (own, micro), generator=random)
    step = [Batch(x, y, torch.arange(micro)) for x, y in zip(images, labels, strict=True)]
    while True:
        yield step


def bare(width: int, micro: int, own: int, world: World, steps: int) -> Block:
    """What one would write by hand: DDP, SGD, cross-entropy, gradients reduced with the last micro-batch."""
    model = DistributedDataParallel(network(width))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    data = micro_batches(micro, own, world.rank)

    def block() -> None:
        model.train()
        for _, batches in zip(range(steps), data, strict=False):
            for j, batch in enumerate(batches):
                model.require_backward_grad_sync = j == own - 1
                logits = model(normalise(batch.images, InputSpec(size=SIZE))).logits_BK
                (F.cross_entropy(logits, batch.labels) / own).backward()
            optimizer.step()
            optimizer.zero_grad()

    return block


def ours(spec: TorchSpec | DeepSpeedSpec, width: int, micro: int, own: int, world: World, steps: int) -> Block:
    """The same through our loop and an engine."""
    micros = own * world.size
    engine = make_engine(network(width), spec, SGD(lr=0.1), (micro * micros, micro), world)
    objective = Objective(
        CrossEntropy(), InputSpec(size=SIZE), micros, 0, 0.1, Schedule(kind="constant", warmup=0), STEPS
    )
    running = train_steps(engine, micro_batches(micro, own, world.rank), objective, world)

    def block() -> None:
        for _ in range(steps):
            next(running)

    return block


def timed(block: Block, world: World) -> float:
    """Seconds until every rank is through."""
    world.barrier()
    began = time.perf_counter()
    block()
    world.barrier()
    return time.perf_counter() - began


def steps_worker(width: int, micro: int, rounds: int, steps: int, file: Path) -> None:
    """On each rank: all candidates take turns; rank 0 writes {accumulation: {name: [seconds of each round]}}."""
    torch.set_num_threads(1)
    found: dict[int, dict[str, list[float]]] = {}
    with joined_world() as world:
        for own in (1, 4):
            each = max(1, steps // own)
            blocks = {"bare DDP": bare(width, micro, own, world, each)}
            blocks |= {name: ours(spec, width, micro, own, world, each) for name, spec in ENGINES.items()}
            for block in blocks.values():
                block()  # warm
            found[own] = {name: [] for name in blocks}
            for turn in range(rounds):
                names = list(blocks)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    found[own][name].append(timed(blocks[name], world) / each)
        if world.rank == 0:
            file.write_text(json.dumps(found))
        world.barrier()
    os._exit(0)  # DeepSpeed's threads may abort at the interpreter's end


def show_steps(found: dict[str, dict[str, list[float]]], micro: int) -> None:
    print(f"| {'steps of':<24} | micro-batches a rank | images/s | of bare DDP | lowest-highest |")
    print("|---|---|---|---|---|")
    for own, seconds in found.items():
        for name, each in seconds.items():
            ratios = [base / own_time for base, own_time in zip(seconds["bare DDP"], each, strict=True)]
            speed = RANKS * micro * int(own) / statistics.median(each)
            spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
            print(f"| {name:<24} | {own} | {speed:.0f} | {statistics.median(ratios):.3f} | {spread} |")


def torchrun(*args: object) -> list[str]:
    options = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--nproc-per-node={RANKS}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, *map(str, args)]


def bare_worker(width: int, micro: int, steps: int, out: Path) -> None:
    """On each rank: the bare loop for itself; rank 0 writes the time after each step as a journey does."""
    torch.set_num_threads(1)
    with joined_world() as world:
        block = bare(width, micro, 1, world, 1)
        rows = []
        for step in range(1, steps + 1):
            block()
            rows.append(json.dumps({"step": step, "time": time.time()}))
        if world.rank == 0:
            out.mkdir()
            (out / "metrics.jsonl").write_text("\n".join(rows))
        world.barrier()


def journey(name: str, out: Path, width: int, micro: int, steps: int, probe_every: int) -> list[float]:
    """Seconds from each step of a whole journey to the next."""
    engine, _, where = name.partition(", ")
    settings = {
        "out": out, "input.size": SIZE, "model.backbone.name": "resnet20", "model.backbone.width": width,
        "batch.global": RANKS * micro, "batch.micro": micro, "data.test": "null", "log_every": 1, "save_every": STEPS,
        "epochs": steps / (1338 // (RANKS * micro)), "measure_every": probe_every, "probe.per_class": 50,
        "launch.workers": RANKS, "data.workers": 0,
    }  # fmt: skip
    if engine.startswith("zero"):
        settings |= {"engine.kind": "deepspeed", "engine.zero": engine.removeprefix("zero ")}
    args = ["pretrain", ROOT / "configs/pretrain/digits_ce.yaml", *(f"{k}={v}" for k, v in settings.items())]
    command = torchrun("-m", "nc_dist", *args)
    if where == "Ray":
        command = [sys.executable, "-m", "nc_dist", *map(str, args), "--on", "ray"]
    if engine == "bare DDP":
        command = torchrun(__file__, "--bare", width, micro, steps, out)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = {row["step"]: row["time"] for row in rows if "time" in row}
    return [times[step + 1] - times[step] for step in range(1, max(times))]


def show_journeys(width: int, micro: int, rounds: int, steps: int, folder: Path) -> None:
    """Whole journeys in turn; of each what a step takes, and what a probe each PROBE_EVERY steps adds to it.

    The probe comes twice, long before that many steps: its time is that of the steps after which it came, less a
    step's.
    """
    cases = ["bare DDP, torchrun", *(f"{engine}, {where}" for engine in JOURNEYS for where in ("torchrun", "Ray"))]
    numbers, every = count(), steps * 9 // 20
    each: dict[str, list[float]] = {name: [] for name in cases}
    probes: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name in cases:
            seconds = journey(name, folder / str(next(numbers)), width, micro, steps, every)
            step = statistics.median(seconds)
            each[name].append(step)
            probed = [seconds[at - 1] - step for at in (every, 2 * every)]
            probes[name].append(statistics.mean(probed) / (PROBE_EVERY * step))
    print(f"\n| {'whole journeys':<20} | images/s | of bare DDP | lowest-highest | probe each {PROBE_EVERY} steps |")
    print("|---|---|---|---|---|")
    for name in cases:
        ratios = [base / own for base, own in zip(each[cases[0]], each[name], strict=True)]
        speed, spread = RANKS * micro / statistics.median(each[name]), f"{min(ratios):.2f}-{max(ratios):.2f}"
        probe = "" if name == cases[0] else f"{100 * statistics.median(probes[name]):.2f} %"
        print(f"| {name:<20} | {speed:.0f} | {statistics.median(ratios):.3f} | {spread} | {probe} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["steps", "journeys"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bare", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        return bare_worker(*map(int, args.bare[:3]), Path(args.bare[3]))
    width, micro, rounds, steps = (4, 16, 2, 4) if args.quick else (16, 128, args.rounds, 4)
    if args.worker:
        return steps_worker(width, micro, rounds, steps, args.worker)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {RANKS} gloo ranks, one thread each")
    print(f"torch {torch.__version__}, deepspeed {version('deepspeed')}")
    print(f"resnet20 width {width}, {SIZE} px, {micro} images a micro-batch\n")
    with tempfile.TemporaryDirectory() as name:
        if args.only != "journeys":
            file = Path(name) / "steps.json"
            quick = ["--quick"] if args.quick else ["--rounds", rounds]
            subprocess.run(torchrun(__file__, *quick, "--worker", file), check=True, cwd=ROOT)
            show_steps(json.loads(file.read_text()), micro)
        if args.only != "steps":
            show_journeys(width, micro, -(-rounds // 2), 40, Path(name))


if __name__ == "__main__":
    main()
