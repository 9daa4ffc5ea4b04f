#!/usr/bin/env python3
"""How fast training is on the GPU at hand, and its memory beside the plan's. No Ray. Its partner is gpu_agree.py.

    .venv/bin/python tools/gpu_check.py                    # everything: about 15 minutes, an estimate until it has run
    .venv/bin/python tools/gpu_check.py --only speed       # or input: shorter calls
    .venv/bin/python tools/gpu_check.py --quick            # tiny and on any machine, a CPU too: whether all of it runs

speed   ResNet-50 and ViT-B/16, 224 pixels, bf16, images on the device: plain torch, compiled, ZeRO 0-3, offload. Every
        case is a process of its own, so that its peak memory is its own. MFU counts three forwards a step.
input   the same two models fed from JPEG shards (short side 256) by loader workers, beside the images on the device.

The exit code is 1 where a case failed; the table stands all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from nc_dist.backbones import SmallResNetSpec, TorchvisionSpec
from nc_dist.data.augment import InputSpec, ResizedCropFlip
from nc_dist.data.order import Order, default_lanes
from nc_dist.data.shards import Shrink, build
from nc_dist.data.shards.source import open_shards
from nc_dist.data.source import open_folder
from nc_dist.data.stream import Batch, train_steps_data
from nc_dist.engine import DeepSpeedSpec, TorchSpec
from nc_dist.engine.make import make_engine
from nc_dist.loop import train_steps
from nc_dist.losses import CrossEntropy
from nc_dist.model import Model, ModelSpec
from nc_dist.objective import Objective
from nc_dist.optim import SGD, AdamW, Schedule
from nc_dist.plan.engines import memory_of
from nc_dist.plan.gpus import recognised
from nc_dist.plan.model_cost import model_cost
from nc_dist.world import World, joined_world

CLASSES, GIB = 1000, 2**30
MODELS = {"resnet50": 256, "vit_b_16": 256}  # images a step
ENGINES: dict[str, dict[str, Any]] = {
    "torch fp32 (TF32 off)": {"kind": "torch", "precision": "fp32"},
    "torch": {"kind": "torch"},
    "torch, compiled": {"kind": "torch", "compile": True},
    "torch, recompute": {"kind": "torch", "recompute": True},
    **{f"ZeRO {stage}": {"kind": "deepspeed", "zero": stage} for stage in range(4)},
    "ZeRO 2, optimiser on CPU": {"kind": "deepspeed", "zero": 2, "offload_optimizer": True},
    "ZeRO 3, all on CPU": {"kind": "deepspeed", "zero": 3, "offload_optimizer": True, "offload_parameters": True},
}


def engine_spec(name: str) -> TorchSpec | DeepSpeedSpec:
    given = {"precision": "bf16", **ENGINES[name]}
    return (TorchSpec if given["kind"] == "torch" else DeepSpeedSpec).model_validate(given)


def setting(model: str, quick: bool) -> tuple[ModelSpec, InputSpec, SGD | AdamW, int]:
    """Model, its input, its optimiser, images a step."""
    if quick:
        return ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=4)), InputSpec(size=32), SGD(lr=0.1), 8
    optim = AdamW(lr=1e-4) if model.startswith("vit") else SGD(lr=0.05)
    return ModelSpec(backbone=TorchvisionSpec(name=model)), InputSpec(size=224), optim, MODELS[model]


def synthetic(images: int, size: int, world: World) -> Iterator[list[Batch]]:
    """Ever the same batch, on the devices: this rank's part of it."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=random)
    labels, own = torch.randint(0, 10, (images,), generator=random), images // world.size
    part = slice(world.rank * own, (world.rank + 1) * own)
    pixels = pixels[part].contiguous(memory_format=torch.channels_last)
    batch = Batch(pixels, labels[part], torch.arange(images)[part]).to(world.device)
    while True:
        yield [batch]


def from_shards(folder: Path, images: int, size: int, world: World, workers: int) -> Iterator[list[Batch]]:
    source = open_shards(str(folder))
    order = Order(source.shard_sizes, 0, images, images, default_lanes(images, images))
    positions = np.arange(len(source.labels))
    return iter(
        train_steps_data(
            source, positions, order, InputSpec(size=size), ResizedCropFlip(), views=1, steps=range(10**6),
            world=world, workers=workers,
        )
    )  # fmt: skip


def seconds_of(steps: Iterator[Any], warm: int, timed: int, device: torch.device) -> float:
    """Of one step, after `warm` of them."""

    def done(n: int) -> float:
        for _ in islice(steps, n):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    began = done(warm)
    return (done(timed) - began) / timed


def objective_of(input: InputSpec, lr: float, micros: int = 1) -> Objective:
    return Objective(CrossEntropy(), input, micros, 0, lr, Schedule(kind="constant", warmup=0), 10**6)


def train_case(model: str, engine: str, quick: bool, shards: Path | None) -> dict[str, Any]:
    """Speed and memory of one model in one engine, on images of the device or from shards."""
    spec, input, optim, images = setting(model, quick)
    warm, timed = (1, 2) if quick else (10, 30)
    tf32 = "fp32" not in engine
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    with joined_world() as world:
        made = make_engine(Model(spec, CLASSES), engine_spec(engine), optim, (images, images), world)
        objective = objective_of(input, optim.lr)
        workers = min(14, (os.cpu_count() or 1) - 1)
        data = from_shards(shards, images, input.size, world, workers) if shards else None
        loaded = data or synthetic(images, input.size, world)
        steps = train_steps(made, loaded, objective, world)
        seconds = seconds_of(steps, warm, timed, world.device)
        found = {"images/s": images / seconds, **plan_of(spec, input, optim, images, engine, world)}
        if world.device.type == "cuda":
            found["peak"] = torch.cuda.max_memory_allocated() / GIB
        if peak := peak_of(engine, world):
            found["mfu"] = 3 * found["flops"] * found["images/s"] / peak
        found["loss"] = next(steps).metrics()["train/loss"]
    return found


def peak_of(engine: str, world: World) -> float | None:
    """FLOP/s of the device at most."""
    known = recognised(world.device_name)
    if known is None:
        return None
    return known.fp32 * 1e12 if "fp32" in engine else known.peak("bf16")


def plan_of(
    spec: ModelSpec, input: InputSpec, optim: SGD | AdamW, images: int, engine: str, world: World
) -> dict[str, float]:
    """What the plan says: GiB on the device, FLOPs of a forward of one image."""
    made = engine_spec(engine)
    cost = model_cost(spec, CLASSES, input, images, made.precision)
    planned = memory_of(made, cost, optim, (images, images), world.size, gpu=True).peak
    return {"planned": planned / GIB, "flops": cost.flops}


def make_shards(folder: Path, quick: bool) -> Path:
    """JPEGs of ImageNet's sizes, shrunk to a short side of 256, in shards."""
    sys.path.insert(0, str(Path(__file__).parent))
    from bench_data import make_folder

    print("images:", make_folder(folder / "jpegs", 60 if quick else 4000))
    list(build(open_folder(folder / "jpegs"), folder / "shards", 500, shrink=Shrink(256)))
    return folder / "shards"


def child(*command: object) -> dict[str, Any]:
    """What a process of its own, started with Python, answers in its last line."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
    except (IndexError, json.JSONDecodeError):
        reason = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": reason[-1][:160] if reason else f"exit code {done.returncode}"}


def show_speed(rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    print("\n| model | engine | input | images/s | MFU | peak GiB | planned GiB |\n|---|---|---|---|---|---|---|")
    for (model, engine, fed), found in rows.items():
        if "error" in found:
            print(f"| {model} | {engine} | {fed} | {found['error']} | | | |")
            continue
        mfu = f"{100 * found['mfu']:.1f} %" if "mfu" in found else ""
        peak = f"{found['peak']:.2f}" if "peak" in found else ""
        print(f"| {model} | {engine} | {fed} | {found['images/s']:.0f} | {mfu} | {peak} | {found['planned']:.2f} |")


def cases(only: str | None, quick: bool) -> Iterator[tuple[tuple[str, str, str], dict[str, Any]]]:
    """Model, engine, input of each case, and what was found."""
    short = ["--quick"] if quick else []
    if only in (None, "speed"):
        for model in MODELS:
            for engine in ENGINES:
                yield (model, engine, "synthetic"), child(__file__, "--case", model, engine, *short)
    if only in (None, "input"):
        with tempfile.TemporaryDirectory() as folder:
            shards = make_shards(Path(folder), quick)
            for model in MODELS:
                yield (
                    (model, "torch", "JPEG shards"),
                    child(__file__, "--case", model, "torch", *short, "--shards", shards),
                )


def begin(quick: bool) -> torch.device:
    """The device, which is told; a CPU only where it is to be quick."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not quick:
        raise SystemExit("no GPU here; --quick shows on a CPU whether all of it runs")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, 224 px, bf16 unless said")
    return device


def answer(found: Any) -> NoReturn:
    """Of a process that another one started."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), flush=True)
    os._exit(0)  # DeepSpeed's threads may abort at the interpreter's end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "input"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        answer(train_case(*args.case, args.quick, args.shards))
    begin(args.quick)
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for case, found in cases(args.only, args.quick):
        rows[case] = found
        print(*case, found, flush=True)
    show_speed(rows)
    return int(any("error" in found for found in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
