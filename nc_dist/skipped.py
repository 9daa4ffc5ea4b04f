"""Steps that were not taken, because loss or gradients were not finite: counted, listed with their samples, and fatal
above a limit. For the training journeys.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from nc_dist.data.source import Source
from nc_dist.errors import Diverged
from nc_dist.loop import Step
from nc_dist.tracking import cut_back
from nc_dist.world import World

FILE = "skipped_steps.jsonl"
LIMIT = 10  # of fine-tuning, which has no key for it
BACKOFFS = 40  # halvings of a loss scale in a row, after which it is not the scale that makes gradients overflow


class Skipped:
    """The skipped steps of a run, the same count on every rank; `count` of them lie before step `start`.

    With a loss scale (fp16) gradients overflow now and then while the loss is finite: the scale is then halved, which
    is its way of working, and the step is not counted.
    """

    def __init__(self, out: Path, limit: int, scaled: bool, world: World, start: int = 0, count: int = 0) -> None:
        self.count, self._limit, self._scaled, self._world = count, limit, scaled, world
        self._path, self._backoffs = out / FILE, 0
        if world.rank == 0:
            cut_back(self._path, start)

    def add(self, step: Step, source: Source) -> None:
        """Count a step that was not taken; every rank calls it after each step. Diverged, on all, above the limit."""
        if step.applied:
            self._backoffs = 0
            return
        loss = step.metrics()["train/loss"]
        self._backoffs += 1
        if self._scaled and math.isfinite(loss) and self._backoffs <= BACKOFFS:
            return
        self.count += 1
        own = [source.key(position) for batch in step.batches for position in batch.positions.tolist()]
        keys = [key for part in self._world.collect(own) for key in part]
        what = f"the loss is {loss:g}" + (", its gradients are not finite" if math.isfinite(loss) else "")
        if self._world.rank == 0:
            line = {"step": step.number, "loss": loss if math.isfinite(loss) else str(loss), "keys": keys}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"step {step.number} skipped, {what}: {self.count} of {self._limit} allowed, samples in {self._path}")
        if self.count > self._limit:
            raise Diverged(
                f"step {step.number}: {what}. {self.count} steps were skipped, max_skipped={self._limit} are allowed; "
                f"their samples are in {self._path}. A smaller optim.lr, a longer warm-up or engine.clip may help"
            )
