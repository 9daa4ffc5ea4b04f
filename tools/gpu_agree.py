#!/usr/bin/env python3
"""Whether training on the GPU at hand computes what the CPU does, and what the statistics of NC take there. No Ray.

    .venv/bin/python tools/gpu_agree.py            # a minute or two on a GPU, an estimate until it has run
    .venv/bin/python tools/gpu_agree.py --quick    # tiny and on any machine, a CPU too: whether all of it runs

Losses of the first steps without TF32: fp32 and bf16 beside the CPU; with two GPUs SyncBatchNorm on both beside
BatchNorm of the whole batch on one. Times are of a probe batch of 256 images: its statistics beside its forward and a
training step of ResNet-50, bf16, 224 pixels. The exit code is 1 where a comparison could not be made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any

import torch

from nc_dist.backbones import SmallResNetSpec
from nc_dist.data.augment import InputSpec
from nc_dist.engine import TorchSpec
from nc_dist.engine.make import make_engine
from nc_dist.loop import train_steps
from nc_dist.model import Model, ModelSpec
from nc_dist.nc import HalvedMoments
from nc_dist.optim import SGD
from nc_dist.world import World, joined_world

sys.path.insert(0, str(Path(__file__).parent))
from gpu_check import CLASSES, answer, begin, child, engine_spec, objective_of, seconds_of, setting, synthetic  # noqa: E402


def losses_on(world: World, precision: str, steps: int = 5) -> list[float]:
    """Of the first steps of a small ResNet from fixed weights; with more processes BatchNorm is over all of them."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = Model(ModelSpec(backbone=SmallResNetSpec(name="resnet20", width=16)), 10)
    if world.size > 1:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    spec = TorchSpec.model_validate({"precision": precision})
    engine = make_engine(model, spec, SGD(lr=0.05), (64, 64 // world.size), world)
    objective = objective_of(InputSpec(size=32), 0.05, world.size)
    running = train_steps(engine, synthetic(64, 32, world), objective, world)
    return [step.metrics()["train/loss"] for step in islice(running, steps)]


def agree(device: torch.device) -> dict[str, Any]:
    """Relative differences of losses, step by step, or why there are none."""
    world = World(device=device)
    found: dict[str, Any] = {}

    def compare(name: str, there: list[float], here: list[float]) -> None:
        found[name] = {"differences": [abs(a - b) / abs(a) for a, b in zip(here, there, strict=True)]}

    cpu = losses_on(World(device=torch.device("cpu")), "fp32")
    for precision in ("fp32", "bf16"):
        compare(f"{precision} beside CPU fp32", losses_on(world, precision), cpu)
    if torch.cuda.device_count() < 2:  # on one process torch's SyncBatchNorm is plain BatchNorm
        print("SyncBatchNorm: needs two GPUs, not exercised")
        return found
    name = "SyncBatchNorm on 2 GPUs beside BatchNorm on 1"
    both = child("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "--sync")
    if "error" in both:
        found[name] = both
    else:
        compare(name, both["losses"], losses_on(world, "fp32"))
    return found


def statistics_cost(device: torch.device, quick: bool) -> dict[str, float]:
    """Milliseconds for a probe batch of ResNet-50 in bf16: training step, forward, moments in fp32 and fp64."""
    spec, input, optim, images = setting("resnet50", quick)
    world, counts = World(device=device), (1, 2) if quick else (5, 20)
    model = Model(spec, CLASSES)
    engine = make_engine(model, engine_spec("torch"), optim, (images, images), world)
    x = torch.randn(images, 3, input.size, input.size, device=device).contiguous(memory_format=torch.channels_last)
    feats = torch.randn(images, model.dim, device=device)
    labels, halves = torch.randint(0, CLASSES, (images,), device=device), torch.arange(images, device=device) % 2 == 0
    data = synthetic(images, input.size, world)
    work: dict[str, Iterator[Any]] = {
        "step": train_steps(engine, data, objective_of(input, optim.lr), world),
        "forward": (engine.eval_forward(x) for _ in count()),
    }
    for dtype in (torch.float32, torch.float64):
        moments = HalvedMoments(CLASSES, model.dim, dtype=dtype, device=device)
        name = str(dtype).removeprefix("torch.")
        work[name] = (moments.update(feats, labels, halves) for moments in repeat(moments))
    return {name: 1000 * seconds_of(again, *counts, world.device) for name, again in work.items()}


def show_agree(found: dict[str, Any], nc: dict[str, float]) -> None:
    print("\n| losses of 5 steps, resnet20 | relative difference by step |\n|---|---|")
    for name, case in found.items():
        print(f"| {name} | {case.get('error') or ', '.join(f'{value:.1e}' for value in case['differences'])} |")
    step, forward = nc.pop("step"), nc.pop("forward")
    print(
        "\n| NC statistics of a batch, K 1000, halves | ms | of its forward | of a training step |\n|---|---|---|---|"
    )
    for name, took in nc.items():
        print(f"| {name} | {took:.2f} | {100 * took / forward:.2f} % | {100 * took / step:.2f} % |")
    print(f"ResNet-50 in bf16 on the same images: forward {forward:.1f} ms, training step {step:.1f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sync", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sync:
        with joined_world() as world:
            losses = losses_on(world, "fp32")
            world.barrier()  # nobody leaves before the other is through
            answer({"losses": losses})
    device = begin(args.quick)
    agreed = agree(device)
    show_agree(agreed, statistics_cost(device, args.quick))
    return int(any("error" in found for found in agreed.values()))


if __name__ == "__main__":
    raise SystemExit(main())
