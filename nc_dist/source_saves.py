"""What of a pre-training run outlives it: where it begins, its checkpoints, which is the best. For `pretrain`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nc_dist import checkpoint, initial_weights
from nc_dist.config import PretrainRun
from nc_dist.engine import Engine
from nc_dist.engine.make import make_engine
from nc_dist.errors import Preempted
from nc_dist.model import Model
from nc_dist.source_model import export_all
from nc_dist.source_probes import NO_SCORE
from nc_dist.source_set import SourceSet
from nc_dist.world import World


@dataclass
class Progress:
    """How far a run is: kept in its checkpoints."""

    step: int = 0
    best: float = NO_SCORE  # of all measured checkpoints
    best_step: int | None = None
    seconds: float = 0.0  # of earlier attempts
    skipped: int = 0  # steps that were not taken


def begin(run: PretrainRun, data: SourceSet, model: Model, world: World) -> tuple[Engine, Progress]:
    """The engine with the weights that the run goes on from, and how far it is."""
    # 1 this run's newest checkpoint, 2 that of run.resume, 3 weights that the backbone's spec names, 4 scratch.
    newest = checkpoint.on_first(world, lambda: checkpoint.resume_from(run, data))
    if newest is None:
        initial_weights.start_from(run.model.backbone, model.backbone, Path(run.out), world.rank == 0)
    engine = make_engine(model, run.engine, run.optim, (run.batch.global_, run.batch.micro), world, run.ema)
    if newest is None:
        return engine, Progress()
    state = engine.load(newest)
    world.barrier()
    if world.rank == 0:
        print(f"goes on from {newest}", flush=True)
        checkpoint.remove_brought(Path(run.out))
    if newest.parent != Path(run.out) / checkpoint.CHECKPOINTS:
        return engine, Progress(step=state["step"])  # the record of another run is not this one's
    return engine, Progress(**{name: state[name] for name in asdict(Progress()) if name in state})


class Saves:
    """The checkpoints of one attempt: when they are due, what is in them, which one is best."""

    def __init__(
        self, run: PretrainRun, data: SourceSet, engine: Engine, world: World, every: int, progress: Progress
    ) -> None:
        self._run, self._data, self._engine, self._world, self._every = run, data, engine, world, every
        self._folder, self._began = Path(run.out) / checkpoint.CHECKPOINTS, time.time()
        self._retention = checkpoint.retention_of(run, data)
        self._uploads = checkpoint.Uploads(run.upload, self._folder, self._retention, world)
        self._progress, self._earlier = progress, progress.seconds

    def due(self, step: int) -> bool:
        """Whether there is a checkpoint of this step, unless the run is asked to stop."""
        return step % self._every == 0 or step in self._retention.chosen or step == self._data.steps

    def save(self, step: int, score: float, skipped: int) -> None:
        """Save, and copy to where the run uploads to; `score` is NO_SCORE where nothing was measured."""
        progress = self._progress
        if score > progress.best:
            progress.best, progress.best_step = score, step
        progress.step, progress.seconds, progress.skipped = step, self.seconds(), skipped
        checkpoint.save(
            self._folder,
            self._engine,
            step,
            asdict(progress) | checkpoint.state_of(self._run, self._data, step),
            self._world,
            best=progress.best_step,
            retention=self._retention,
            in_use=self._uploads.in_use,
            beside=lambda partial: export_all(partial, self._run, self._data, self._engine, self._world),
        )
        self._uploads.add(step)

    def seconds(self) -> float:
        """How long the run has taken, earlier attempts included."""
        return self._earlier + time.time() - self._began

    def close(self, stop: Callable[[], bool], alive: Callable[[], object]) -> dict[str, Any]:
        """End the uploads; what the result says of the checkpoints. `alive` is called now and then while this waits.

        Preempted, on every rank, where `stop()` cut the uploads short.
        """
        progress, uploaded = self._progress, self._uploads.close(stop, alive)
        if uploaded is None:
            raise Preempted(progress.step)
        known = {"best_step": progress.best_step, "best_score": progress.best if progress.best_step else None}
        return known | uploaded
