"""How fast a run is and what memory it takes: the scalars under perf/ and sys/. For `pretrain`."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field, replace

import torch

from nc_dist.config import PretrainRun
from nc_dist.loop import Step
from nc_dist.plan.gpus import recognised
from nc_dist.plan.model_cost import model_cost
from nc_dist.plan.time import mfu
from nc_dist.world import World


@dataclass
class Perf:
    """Of one run in one world. The GPU's `peak`, FLOP/s, and the FLOPs of one image's `forward` are 0 where unknown.

    A step queues work that a GPU does in the next one, so that only the mean over many steps says how fast it is.
    """

    world: World
    batch: int
    views: int
    peak: float = 0
    forward: int = 0
    _seconds: list[tuple[float, float]] = field(default_factory=list)  # of steps since the last scalars, and their data

    def add(self, step: Step) -> None:
        """To be called after each step."""
        self._seconds.append((step.seconds, step.data_seconds))

    def scalars(self) -> dict[str, float]:
        """Of the steps since the last call, at least one: images a second over all processes, the share of waiting for
        data, MFU, peak memory in GB.
        """
        seconds, waited = (sum(column) for column in zip(*self._seconds, strict=True))
        per_second = self.batch * len(self._seconds) / seconds
        self._seconds = []
        found = {
            "perf/images_per_second": per_second,
            "perf/data_wait_frac": waited / seconds,
            **self._memory(),
        }
        if self.peak and self.forward:
            found["perf/mfu"] = mfu(per_second * self.views, self.forward, self.peak, self.world.size)
        return found

    def _memory(self) -> dict[str, float]:
        if self.world.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.world.device)
            torch.cuda.reset_peak_memory_stats(self.world.device)
            return {"sys/gpu_memory_gb": reserved / 1e9}
        return {"sys/rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def perf_of(run: PretrainRun, num_classes: int, world: World) -> Perf:
    """That of a run; `num_classes` of the classifier, 0 without one. Says why a known GPU gets no MFU."""
    known = Perf(world, run.batch.global_, run.loss.views)
    device = recognised(world.device_name)
    if device is None:
        return known
    cost = model_cost(run.model, num_classes, run.input, images=2)
    if cost.untraced and world.rank == 0:
        print(f"perf/mfu: not logged, the net cannot be traced ({cost.untraced})", flush=True)
    return replace(known, peak=device.peak(run.engine.precision, cost.attention), forward=cost.flops)
