#!/usr/bin/env python3
"""Times the NC statistics against a floor and against plain ways, side by side in one run; prints one table.

    .venv/bin/python tools/bench_nc.py                 # the statistics: about a minute on one CPU thread
    .venv/bin/python tools/bench_nc.py --measure       # besides: NC at all blocks of ResNet-50 against its forward

Floor: one D x D product of a batch of 256 features, which every way of getting a covariance pays. All ways see the
same batches in turn, many times; a ratio is the median over rounds of floor time / time, so above 1 is below the floor.
Errors are relative, of NC1 against an fp64 two-pass, at class means of norm 20 and noise of std 1e-3.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torchvision.models import resnet50

from nc_dist.collapse import collapse
from nc_dist.data.augment import InputSpec
from nc_dist.data.source import ArraySource
from nc_dist.data.stream import Batch, eval_batches
from nc_dist.engine import evaluating
from nc_dist.features import Probe, forwarded
from nc_dist.nc import ClassMoments, HalvedMoments, Statistics
from nc_dist.nc.metrics import nc1
from nc_dist.subject import open_subject
from nc_dist.world import World

BATCH, NUM_BATCHES = 256, 8
SHAPES = [(d, k) for d in (512, 2048) for k in (100, 1000)]
Batches = list[tuple[Tensor, Tensor]]
Way = Callable[[Tensor, Tensor], object]


def features(dim: int, classes: int, device: str, std: float = 1e-3) -> Batches:
    """Batches of features around class means of norm 20."""
    random = torch.Generator().manual_seed(0)
    means = torch.randn(classes, dim, generator=random)
    means *= 20 / means.norm(dim=1, keepdim=True)
    labels = torch.randint(classes, (NUM_BATCHES, BATCH), generator=random)
    noise = std * torch.randn(NUM_BATCHES, BATCH, dim, generator=random)
    return [((means[y] + e).to(device), y.to(device)) for y, e in zip(labels, noise, strict=True)]


class Naive:
    """E[x x^T] - mu mu^T, uncentred sums in one dtype."""

    def __init__(self, classes: int, dim: int, dtype: torch.dtype, device: str) -> None:
        self.n = torch.zeros(classes, dtype=dtype, device=device)
        self.sums = torch.zeros(classes, dim, dtype=dtype, device=device)
        self.products = torch.zeros(dim, dim, dtype=dtype, device=device)

    def update(self, x: Tensor, y: Tensor) -> None:
        x = x.to(self.n.dtype)
        self.n.index_add_(0, y, torch.ones_like(y, dtype=x.dtype))
        self.sums.index_add_(0, y, x)
        self.products.addmm_(x.T, x)

    def nc1(self) -> float:
        n = self.n.clamp(min=1)
        means = self.sums / n[:, None]
        scatter = self.products - (means * n[:, None]).T @ means
        return nc1(_statistics(self.n, means, scatter))


class TwoPass:
    """Class means first, then the product of centred features: every feature is read twice."""

    def __init__(self, classes: int, dim: int, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.n = torch.zeros(classes, dtype=dtype, device=device)
        self.sums = torch.zeros(classes, dim, dtype=dtype, device=device)
        self.products = torch.zeros(dim, dim, dtype=dtype, device=device)

    def first(self, x: Tensor, y: Tensor) -> None:
        self.n.index_add_(0, y, torch.ones_like(y, dtype=self.n.dtype))
        self.sums.index_add_(0, y, x.to(self.n.dtype))

    def second(self, x: Tensor, y: Tensor) -> None:
        residuals = x.to(self.n.dtype) - (self.sums / self.n.clamp(min=1)[:, None])[y]
        self.products.addmm_(residuals.T, residuals)

    def update(self, x: Tensor, y: Tensor) -> None:
        self.first(x, y)
        self.second(x, y)

    def nc1(self) -> float:
        return nc1(_statistics(self.n, self.sums / self.n.clamp(min=1)[:, None], self.products))


def _statistics(n: Tensor, means: Tensor, scatter: Tensor) -> Statistics:
    zeros = torch.zeros_like(n, dtype=torch.float64)
    return Statistics(n.double(), means.double(), scatter.double(), zeros, zeros.new_zeros(means.shape[1]))


def errors(dim: int, classes: int, device: str) -> dict[str, float]:
    """Relative error of NC1 of each way; the features of all ways are the same."""
    batches = features(dim, classes, device)
    exact = TwoPass(classes, dim, device, torch.float64)
    plain = TwoPass(classes, dim, device)
    ways = {
        "ours": ClassMoments(classes, dim, blocks=1, device=device),
        "ours, triangular": ClassMoments(classes, dim, device=device),
        "ours, triangular, fp64": ClassMoments(classes, dim, dtype=torch.float64, device=device),
        "naive fp64": Naive(classes, dim, torch.float64, device),
        "naive fp32": Naive(classes, dim, torch.float32, device),
    }
    for x, y in batches:
        exact.first(x, y)
        plain.first(x, y)
        for way in ways.values():
            way.update(x, y)
    for x, y in batches:
        exact.second(x, y)
        plain.second(x, y)
    reference = exact.nc1()
    found = {name: nc1(way) if isinstance(way, ClassMoments) else way.nc1() for name, way in ways.items()}
    return {name: abs(value / reference - 1) for name, value in {**found, "two-pass": plain.nc1()}.items()}


def timed(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def bench(dim: int, classes: int, device: str, rounds: int) -> None:
    """One shape: all ways take turns on the same batches."""
    batches = features(dim, classes, device)
    out = torch.empty(dim, dim, device=device)
    ways: dict[str, Way] = {
        "floor": lambda x, y: torch.mm(x.T, x, out=out),
        "ours": ClassMoments(classes, dim, blocks=1, device=device).update,
        "ours, triangular": ClassMoments(classes, dim, device=device).update,
        "ours, triangular, fp64": ClassMoments(classes, dim, dtype=torch.float64, device=device).update,
        "naive fp32": Naive(classes, dim, torch.float32, device).update,
        "naive fp64": Naive(classes, dim, torch.float64, device).update,
        "two-pass": TwoPass(classes, dim, device).update,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-2, rounds):  # the first two warm up
        for name, way in ways.items():
            took = sum(timed(lambda way=way, b=b: way(*b), device) for b in batches) / NUM_BATCHES  # type: ignore[misc]
            if turn >= 0:
                seconds[name].append(took)
    wrong = errors(dim, classes, device)
    for name, times in seconds.items():
        ratio = statistics.median(f / t for f, t in zip(seconds["floor"], times, strict=True))
        error = f"{wrong[name]:.0e}" if name in wrong else "-"
        per_batch, rate = 1e3 * statistics.median(times), BATCH / statistics.median(times)
        print(
            f"{dim:>5} {classes:>5}  {name:<23} {per_batch:>9.2f} {rate:>11,.0f} {ratio:>7.2f} {error:>8}", flush=True
        )


def forward_share(device: str, rounds: int) -> None:
    """What the statistics of the last features cost beside the forward that makes them."""
    size = 256 if device == "cuda" else 8
    net = resnet50(weights=None).to(device).eval().to(memory_format=torch.channels_last)
    images = torch.randn(size, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    x, y = features(2048, 1000, device)[0]
    ways = {
        "fp32": ClassMoments(1000, 2048, device=device),
        "fp64, in halves, as `measure` keeps them": HalvedMoments(1000, 2048, dtype=torch.float64, device=device),
    }
    with torch.inference_mode():
        forwards = [timed(lambda: net(images), device) / size for _ in range(3 + rounds // 4)]
    forward = statistics.median(forwards[1:])
    print(
        f"\nResNet-50, 224 px, fp32, batch {size}: forward {1e3 * forward:.2f} ms an image; of it, at d=2048, K=1000:"
    )
    for name, way in ways.items():
        took = statistics.median(timed(lambda way=way: way.update(x, y), device) / BATCH for _ in range(rounds))  # type: ignore[misc]
        print(f"  {name}: {1e3 * took:.3f} ms, {100 * took / forward:.2f} %")


def measure_all_blocks(device: str, samples: int, threads: int, size: int = 224) -> None:
    """NC at all blocks of ResNet-50 against the forward alone: the same images, in turn, two rounds each."""
    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (samples, size, size), dtype=np.uint8)
    source = ArraySource("noise:train", [str(k) for k in range(10)], images, np.arange(samples, dtype=np.int64) % 10)
    world, subject = World(device=torch.device(device)), open_subject("torchvision:resnet50")
    subject.module.to(device)
    spec, names = InputSpec(size=size), [block.name for block in subject.blocks]
    positions = np.arange(samples)

    def batches() -> Iterator[Batch]:
        return eval_batches(source, positions, spec, 32, world)

    def forward_alone() -> None:
        for _ in forwarded(lambda x: (subject.observe(x, ())[0], {}), batches(), spec, torch.float32, True):
            pass

    def measured() -> None:
        collapse(
            lambda: forwarded(lambda x: subject.observe(x, names), batches(), spec, torch.float32, True),
            Probe(source, positions),
            world,
            {},
            rank_per_class=50,
        )

    with evaluating(subject.module):
        pairs = [(timed(forward_alone, device), timed(measured, device)) for _ in range(2)]
    ratios = ", ".join(f"{with_nc / alone:.3f}" for alone, with_nc in pairs)
    what = (
        f"{samples} images of 10 classes, {len(names)} blocks and the last features, every metric, {threads} thread(s)"
    )
    times = f"forward alone {pairs[0][0]:.1f} s, with NC {pairs[0][1]:.1f} s; ratios {ratios}"
    print(f"\nResNet-50, {size} px, {what}:\n  {times}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--measure", action="store_true", help="NC at all blocks against the forward, some minutes")
    parser.add_argument("--samples", type=int, default=1000, help="images of --measure")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
        print(f"\n{name}, torch {torch.__version__}, batches of {BATCH}, median of {options.rounds} rounds")
        print("    d     K  way                      ms/batch   samples/s  floor/t    error")
        for dim, classes in SHAPES:
            bench(dim, classes, device, options.rounds)
        forward_share(device, options.rounds)
        if options.measure:
            measure_all_blocks(device, options.samples, options.threads)


if __name__ == "__main__":
    main()
