"""What a run would do, on paper: printed by --dry-run. Pure arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cluster:
    """A cluster that a run is planned for, whether one has it or not. `gpu` as in gpus.py here, None: its own."""

    nodes: int = 1
    gpus_per_node: int | None = None  # None: as many processes as the run would have here
    gpu: str | None = None

    @property
    def world(self) -> int | None:
        """Processes, one for each GPU; None: as many as the run would have here."""
        return None if self.gpus_per_node is None else self.nodes * self.gpus_per_node


def training_plan(
    *, samples: int, heldout: int, global_batch: int, micro: int, lanes: int, steps: int, world: int
) -> dict[str, Any]:
    """Steps and their parts for a training run on `world` processes."""
    per_epoch = samples // global_batch
    num_micro = global_batch // micro
    return {
        "training samples": samples,
        "held out": heldout,
        "steps per epoch": per_epoch,
        "steps": steps,
        "left out per epoch (other samples each time)": samples - per_epoch * global_batch,
        "micro-batches per step": num_micro,
        "processes": world,
        "accumulated per process": num_micro // world,
        "possible numbers of processes": [w for w in range(1, num_micro + 1) if num_micro % w == 0],
        "lanes": lanes,
    }


def notes(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What is to be said of the sets of a run, {name: what is known of it}: nothing where all is as published."""
    return {f"data.{name}": "; ".join(about["notes"]) for name, about in sets.items() if about["notes"]}


def as_bytes(size: float) -> str:
    """1.5 GB, in powers of 1000 as GPUs and disks are sold."""
    return _scaled(size, "B")


def as_flops(count: float) -> str:
    """1.5 TFLOP."""
    return _scaled(count, "FLOP")


def _scaled(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} E{unit}"


def show(plan: Mapping[str, Any]) -> str:
    """The plan as aligned lines."""
    width = max(map(len, plan))
    return "\n".join(f"  {key:<{width}}  {value}" for key, value in plan.items())
