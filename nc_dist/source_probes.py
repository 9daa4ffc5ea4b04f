"""NC of a source model's probes while it trains: measured when asked, written down and drawn. For `pretrain`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from nc_dist.collapse import Collapse, collapse
from nc_dist.config import PretrainRun
from nc_dist.data.damage import BadSamples
from nc_dist.data.subset import per_class
from nc_dist.engine import HALF, Engine
from nc_dist.errors import Diverged
from nc_dist.features import Observe, Probe, passes_over
from nc_dist.model import classifier_of
from nc_dist.nc import NotFinite
from nc_dist.nc.metrics import LIVE
from nc_dist.nc.statistics import Statistics, Undefined, centred_means
from nc_dist.skipped import FILE
from nc_dist.source_set import SourceSet
from nc_dist.tracking import Tracker, flat_probes, nc_warnings
from nc_dist.world import World

NO_SCORE = -1.0


class Measured(NamedTuple):
    """Of the probes {train: {before: {...}, after: {...}, acc1: ..}, heldout: ..}, and what drawings are made of."""

    nc: dict[str, Any]
    nc_ema: dict[str, Any]  # of the averaged weights, {} where the run keeps none
    means: Statistics  # of the train probe before the head


class Measures:
    """The probes' NC while a run trains, and what of the time that takes. Every rank calls everything."""

    def __init__(
        self, run: PretrainRun, data: SourceSet, engine: Engine, world: World, bad: BadSamples, tracker: Tracker
    ) -> None:
        self._of, self._tracker = (run, data, engine, world, bad), tracker
        self._names = data.source.class_names
        self._began, self._seconds = time.time(), 0.0
        self._newest: Measured | None = None

    def take(self, step: int, draw: bool = False) -> float:
        """Measure, write, and where asked draw the class means; the score by which checkpoints are compared."""
        asked = time.time()
        found = self._newest = measure(*self._of)
        self._seconds += time.time() - asked
        share = {"perf/measure_frac": self._seconds / (time.time() - self._began)} if step else {}
        scalars = flat_probes(found.nc) | ema_scalars(found.nc_ema) | share
        self._tracker.scalars(step, scalars, **nc_warnings(found.nc))
        if draw:
            self.show_class_means(step)
        return score_of(found.nc)

    def newest(self) -> Measured:
        """What was measured last, now where nothing was."""
        self._newest = self._newest or measure(*self._of)
        return self._newest

    def show_class_means(self, step: int, projector: bool = False) -> None:
        """The figure of the class means, and the projector's points; a warning where there are none."""
        stats = self.newest().means
        names = [self._names[int(k)] for k in stats.present_P]
        try:
            self._tracker.class_means(step, centred_means(stats).cpu(), names, projector)
        except Undefined as why:
            self._tracker.scalars(step, {}, warnings=[f"train: no figure of class means, {why}"])


def measure(run: PretrainRun, data: SourceSet, engine: Engine, world: World, bad: BadSamples) -> Measured:
    """NC of the probes with the weights, and with the averaged ones.

    Diverged, on every rank, where the features are not finite: no step can mend that.
    """
    headless = engine.module.headless
    try:
        found = probed(run, data, engine, world, bad)
        averaged: dict[str, Collapse] = {}
        if run.ema is not None:
            with engine.averaged():
                averaged = probed(run, data, engine, world, bad)
    except NotFinite as error:
        raise Diverged(f"{error}. Steps that were skipped before are in {Path(run.out) / FILE}, if any") from None
    nc, nc_ema = ({name: seen.by_place(headless) for name, seen in probes.items()} for probes in (found, averaged))
    return Measured(nc, nc_ema, found["train"].moments["after" if headless else "before"].statistics())


def probed(run: PretrainRun, data: SourceSet, engine: Engine, world: World, bad: BadSamples) -> dict[str, Collapse]:
    """The collapse of the train and the held-out probe, before and after the head.

    Held-out NC, its values about the training means, and validation accuracy share one forward.
    """
    classifier = None
    if engine.module.classifier is not None:
        with engine.gathered(engine.module.classifier) as model:
            classifier = classifier_of(model)
    headless, dtype = engine.module.headless, engine.input_dtype
    found: dict[str, Collapse] = {}
    for name, positions in (("train", data.train), ("heldout", data.heldout)):
        if len(positions):
            chosen = per_class(data.source.labels, run.probe.per_class, run.seed, positions)
            probe, forward = Probe(data.source, chosen, run.seed), forward_of(engine)
            found[name] = collapse(
                passes_over(probe, forward, run.input, dtype, run.probe.batch, world, run.data.workers, headless, bad),
                probe,
                world,
                {"after": classifier} if classifier else {},
                only=LIVE,
                reference=found["train"].moments if name == "heldout" else None,
                rounded_to=HALF.get(run.engine.precision),
            )
    return found


def forward_of(engine: Engine) -> Observe:
    """The engine's network as it is measured, without blocks."""
    return lambda x: (engine.eval_forward(x), {})


def ema_scalars(nc: dict[str, Any]) -> dict[str, float | None]:
    """What was measured of the averaged weights, as val/ema_acc1, nc/ema_train_before/nc1 and so on."""
    return {name.replace("/", "/ema_", 1): value for name, value in flat_probes(nc).items()}


def score_of(nc: dict[str, Any]) -> float:
    """What chooses the best checkpoint: held-out accuracy, that of the nearest class centre without a classifier."""
    heldout = nc.get("heldout", {})
    score = heldout.get("acc1", heldout.get("before", {}).get("ncc_acc1"))
    return NO_SCORE if score is None else float(score)
