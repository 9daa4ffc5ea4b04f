#!/usr/bin/env python3
"""What training does on the GPU at hand: speed, memory beside the plan's, agreement with the CPU. No Ray; tables last.

    .venv/bin/python tools/gpu_check.py                    # everything, on one GPU about 15 minutes
    .venv/bin/python tools/gpu_check.py --only speed       # or input, agree: shorter calls
    .venv/bin/python tools/gpu_check.py --quick            # tiny and on any machine, a CPU too: whether all of it runs

speed   ResNet-50 and ViT-B/16, 224 pixels, bf16, images on the device: plain torch, compiled, ZeRO 0-3, offload. Every
        case is a process of its own, so that its peak memory is its own. MFU counts three forwards a step.
input   the same two models fed from JPEG shards (short side 256) by loader workers, beside the images on the device.
agree   fp32 without TF32: losses of the first steps on CPU and GPU; bf16 beside fp32; SyncBatchNorm beside BatchNorm;
        what the statistics of NC take of a forward.
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
from typing import Any

import numpy as np
import torch

from nc_dist.backbones import SmallResNetSpec, TorchvisionSpec
from nc_dist.data.augment import InputSpec, ResizedCropFlip
from nc_dist.data.order import Order, default_lanes
from nc_dist.data.shards import Shrink, build
from nc_dist.data.shards.source import open_shards
from nc_dist.data.source import open_folder
from nc_dist.data.stream import Batch, train_steps_data
from nc_dist.engine import DeepSpeedSpec, TorchSpec, deepspeed_json
from nc_dist.gpus import recognised
from nc_dist.loop import train_steps
from nc_dist.losses import CrossEntropy
from nc_dist.make_engine import make_engine
from nc_dist.model import Model, ModelSpec
from nc_dist.model_cost import model_cost, optimizer_bytes
from nc_dist.nc import HalvedMoments
from nc_dist.objective import Objective
from nc_dist.optim import SGD, AdamW, Schedule
from nc_dist.plan_memory import DDP_BUCKETS, states, zero_settings
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
FED = ("resnet50", "vit_b_16")


def engine_spec(name: str) -> TorchSpec | DeepSpeedSpec:
    given = {"precision": "bf16", **ENGINES[name]}
    return (TorchSpec if given["kind"] == "torch" else DeepSpeedSpec).model_validate(given)


def setting(model: str, quick: bool) -> tuple[ModelSpec, InputSpec, SGD | AdamW, int]:
    """Model, its input, its optimiser, images a step."""
    if quick:
        return ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=4)), InputSpec(size=32), SGD(lr=0.1), 8
    optim = AdamW(lr=1e-4) if model.startswith("vit") else SGD(lr=0.05)
    return ModelSpec(backbone=TorchvisionSpec(name=model)), InputSpec(size=224), optim, MODELS[model]


def synthetic(images: int, size: int, device: torch.device) -> Iterator[list[Batch]]:
    """Ever the same batch, on the device."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=random)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    batch = Batch(pixels, torch.randint(0, 10, (images,), generator=random), torch.arange(images)).to(device)
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


def train_case(model: str, engine: str, quick: bool, shards: Path | None) -> dict[str, Any]:
    """Speed and memory of one model in one engine, on images of the device or from shards."""
    spec, input, optim, images = setting(model, quick)
    warm, timed = (1, 2) if quick else (10, 30)
    tf32 = "fp32" not in engine
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    with joined_world() as world:
        made = make_engine(Model(spec, CLASSES), engine_spec(engine), optim, (images, images), world)
        objective = Objective(CrossEntropy(), input, 1, 0, optim.lr, Schedule(kind="constant", warmup=0), 10**6)
        workers = min(14, (os.cpu_count() or 1) - 1)
        data = from_shards(shards, images, input.size, world, workers) if shards else None
        loaded = data or synthetic(images, input.size, world.device)
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
    ours = isinstance(made, TorchSpec)
    trained = sum(cost.trained)
    json = {} if ours else deepspeed_json(made, images, images, world.size, trained, gpu=True)
    settings = json.get("zero_optimization", {"stage": 0})
    stage = DDP_BUCKETS if ours else made.zero  # type: ignore[union-attr]
    held = states(
        stage, cost.trained, optimizer_bytes(optim), world.size, zero_settings(settings), buffers=cost.buffers,
        frozen=cost.frozen,
    )  # fmt: skip
    activations = cost.recomputed if made.recompute else cost.activations
    return {"planned": held.peak(activations) / GIB, "flops": cost.flops}


def losses_on(device: str, precision: str, sync: bool, steps: int) -> list[float]:
    """Of the first steps of a small ResNet from fixed weights."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = Model(ModelSpec(backbone=SmallResNetSpec(name="resnet20", width=16)), 10)
    if sync:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    world = World(device=torch.device(device))
    spec = TorchSpec.model_validate({"precision": precision})
    engine = make_engine(model, spec, SGD(lr=0.05), (64, 64), world)
    objective = Objective(CrossEntropy(), InputSpec(size=32), 1, 0, 0.05, Schedule(kind="constant", warmup=0), steps)
    data = synthetic(64, 32, world.device)
    return [step.metrics()["train/loss"] for step in train_steps(engine, data, objective, world)]


def agree(device: str) -> dict[str, Any]:
    """Largest relative differences of losses, and the share of NC statistics."""
    cpu = losses_on("cpu", "fp32", False, 5)
    pairs = {"fp32 beside CPU": ("fp32", False), "bf16 beside CPU fp32": ("bf16", False)}
    if device == "cuda":
        pairs["SyncBatchNorm fp32 beside CPU"] = ("fp32", True)
    found: dict[str, Any] = {}
    for name, (precision, sync) in pairs.items():
        there = losses_on(device, precision, sync, 5)
        found[name] = [abs(a - b) / abs(a) for a, b in zip(cpu, there, strict=True)]
    return found | {"nc": statistics_cost(device)}


def statistics_cost(device: str) -> dict[str, float]:
    """Milliseconds of adding a batch of 256 to the moments, d 2048, 1,000 classes."""
    feats = torch.randn(256, 2048, device=device)
    labels, halves = torch.randint(0, CLASSES, (256,), device=device), torch.arange(256, device=device) % 2 == 0
    found = {}
    for dtype in (torch.float32, torch.float64):
        moments = HalvedMoments(CLASSES, 2048, dtype=dtype, device=device)

        def updates(moments: HalvedMoments = moments) -> Iterator[None]:
            while True:
                moments.update(feats, labels, halves)
                yield

        found[str(dtype).removeprefix("torch.")] = 1000 * seconds_of(updates(), 5, 20, torch.device(device))
    return found


def make_shards(folder: Path, quick: bool) -> Path:
    """JPEGs of ImageNet's sizes, shrunk to a short side of 256, in shards."""
    sys.path.insert(0, str(Path(__file__).parent))
    from bench_data import make_folder

    print("images:", make_folder(folder / "jpegs", 60 if quick else 4000))
    list(build(open_folder(folder / "jpegs"), folder / "shards", 500, shrink=Shrink(256)))
    return folder / "shards"


def child(*args: object) -> dict[str, Any]:
    """This script in a process of its own; its last line is the answer."""
    command = [sys.executable, __file__, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
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


def show_agree(found: dict[str, Any]) -> None:
    print("\n| losses of 5 steps, resnet20 | largest relative difference by step |\n|---|---|")
    for name, worst in found.items():
        if name != "nc":
            print(f"| {name} | {', '.join(f'{value:.1e}' for value in worst)} |")
    times = ", ".join(f"{name} {value:.2f} ms" for name, value in found["nc"].items())
    print(f"\nNC statistics of 256 features, d 2048, K 1000, halves: {times}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "input", "agree"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device, quick = "cuda" if torch.cuda.is_available() else "cpu", ["--quick"] if args.quick else []
    if args.case:
        print(json.dumps(train_case(*args.case, args.quick, args.shards)), flush=True)
        os._exit(0)  # DeepSpeed's threads may abort at the interpreter's end
    if device == "cpu" and not args.quick:
        raise SystemExit("no GPU here; --quick shows on a CPU whether all of it runs")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, 224 px, bf16 unless said")
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.only in (None, "speed"):
            for model in MODELS:
                for engine in ENGINES:
                    rows[model, engine, "synthetic"] = child("--case", model, engine, *quick)
                    print(model, engine, rows[model, engine, "synthetic"], flush=True)
        if args.only in (None, "input"):
            shards = make_shards(Path(folder), args.quick)
            for model in FED:
                found = child("--case", model, "torch", *quick, "--shards", shards)
                rows[model, "torch", "JPEG shards"] = found
                print(model, "from shards", found, flush=True)
    agreed = agree(device) if args.only in (None, "agree") else None
    if rows:
        show_speed(rows)
    if agreed:
        show_agree(agreed)


if __name__ == "__main__":
    main()
