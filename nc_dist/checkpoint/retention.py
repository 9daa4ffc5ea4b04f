"""Which checkpoints stay, and the links to the last and the best one. The same rule here and behind a URL."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from nc_dist.checkpoint.manifest import STEP, is_step

LAST, BEST = "last", "best"
PARTIAL = ".partial"  # ends the name of what is not complete: being written, or being removed


@dataclass(frozen=True)
class Retention:
    """The `keep` newest checkpoints stay (None: all), those of the `chosen` steps, and the best one."""

    keep: int | None = 2
    chosen: frozenset[int] = frozenset()

    def staying(self, steps: Iterable[int], best: int | None) -> set[int]:
        """The steps whose checkpoints stay."""
        ordered = sorted(steps)
        newest = ordered[-self.keep :] if self.keep else ordered
        return {step for step in ordered if step in newest or step in self.chosen or step == best}


def chosen_steps(epochs: Iterable[float], steps_per_epoch: int) -> frozenset[int]:
    """The steps at which these epochs end, whole or not."""
    return frozenset(max(1, round(epoch * steps_per_epoch)) for epoch in epochs)


def link(folder: Path, name: str, target: str) -> None:
    """Move a relative link in one step, so that it never points nowhere."""
    fresh = folder / f"{name}.new"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, folder / name)


def linked_step(folder: Path, name: str) -> int | None:
    """The step that a link points to, None without one."""
    path = folder / name
    target = path.readlink().name if path.is_symlink() else ""
    return int(target.removeprefix(STEP)) if is_step(target) else None


def prune(folder: Path, retention: Retention, in_use: Collection[int] = ()) -> None:
    """Remove what need not stay, and what an earlier attempt left half-written or half-removed.

    A checkpoint loses its name first: one that is half gone is never taken for a damaged one.
    """
    steps = [int(path.name.removeprefix(STEP)) for path in folder.iterdir() if is_step(path.name)]
    staying = retention.staying(steps, linked_step(folder, BEST)) | set(in_use)
    for left in folder.glob(f"{STEP}*{PARTIAL}"):
        shutil.rmtree(left)
    for step in sorted(set(steps) - staying):
        shutil.rmtree((folder / f"{STEP}{step}").rename(folder / f"{STEP}{step}{PARTIAL}"))
