"""Which checkpoints stay, and the links to the last and the best one. The same rule here and behind a URL."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nc_dist.checkpoint.manifest import STEP, is_step

LAST, BEST = "last", "best"
PARTIAL = ".partial"  # ends the name of what is not complete: being written, or being removed


@dataclass(frozen=True)
class Retention:
    """The `keep` newest checkpoints stay (None: all), those of the `chosen` steps, and the best one.

    Newest is the one that was committed last. Those beyond it are of a future that is run again, as when damaged ones
    were passed over: they do not stay.
    """

    keep: int | None = 2
    chosen: frozenset[int] = frozenset()

    def staying(self, steps: Iterable[int], newest: int, best: int | None) -> set[int]:
        """The steps whose checkpoints stay, `newest` being the one committed last."""
        ordered = sorted(step for step in steps if step <= newest)
        kept = ordered[-self.keep :] if self.keep else ordered
        return {step for step in ordered if step in kept or step in self.chosen or step == best}


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


def link_best(folder: Path, step: int | None) -> None:
    """Let the link point to the best checkpoint; there is no link where it is not there."""
    if step is not None and (folder / f"{STEP}{step}").is_dir():
        link(folder, BEST, f"{STEP}{step}")
    else:
        (folder / BEST).unlink(missing_ok=True)


def prune(folder: Path, retention: Retention, newest: int, in_use: Collection[int] = ()) -> None:
    """Remove what need not stay, and what an earlier attempt left half-written or half-removed."""
    steps = [int(path.name.removeprefix(STEP)) for path in folder.iterdir() if is_step(path.name)]
    staying = retention.staying(steps, newest, linked_step(folder, BEST)) | set(in_use)
    for left in folder.glob(f"{STEP}*{PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)
    for step in sorted(set(steps) - staying):
        discard(folder / f"{STEP}{step}")


def discard(folder: Path) -> None:
    """Remove a folder, if there is one, as far as that is possible; a later `prune` tries the rest again.

    It loses its name first: the name is free even where NFS keeps a file that is still open somewhere, and a checkpoint
    that is half gone is never taken for a damaged one.
    """
    with suppress(OSError):  # tidying up ends no run; who needs the name learns there that it is not free
        aside = folder.rename(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL}"))
        shutil.rmtree(aside, ignore_errors=True)
