"""A run's newest scalars as Ray gauges, which Prometheus finds at each node's metrics port. Set by the driver."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.util.metrics import Gauge

from nc_dist.launch.tail import following
from nc_dist.tracking import FILE


@contextmanager
def gauges(out: Path) -> Iterator[None]:
    """While the block runs, `train/loss` of metrics.jsonl is the gauge nc_dist_train_loss with the tag run=<folder>.

    Ray exports it as ray_nc_dist_train_loss. Every scalar with a slash in its name is one, and nc_dist_step.
    """
    made: dict[str, Gauge] = {}

    def show(line: str) -> None:
        for name, value in scalars(line).items():
            if name not in made:
                made[name] = Gauge(name, description=f"{name} of the newest step that has it", tag_keys=("run",))
                made[name].set_default_tags({"run": out.name})
            made[name].set(value)

    with following(out / FILE, show):
        yield


def scalars(line: str) -> dict[str, float]:
    """The numbers of one row of metrics.jsonl by their gauges' names; none of a line that is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    kept = {key: value for key, value in row.items() if "/" in key or key == "step"}
    return {
        "nc_dist_" + re.sub(r"\W", "_", key): float(value)
        for key, value in kept.items()
        if isinstance(value, int | float)
    }
