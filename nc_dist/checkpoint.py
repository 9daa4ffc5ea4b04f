"""Checkpoints: written by all ranks, complete or not there at all.

Phase one: each rank writes its files into step_N.partial, and a mark that it did. Phase two, after a barrier: rank 0
checks that all marks are there, writes manifest.json with sizes and hashes, renames to step_N and moves the links
`last` and `best`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nc_dist.engine import Engine
from nc_dist.identity import hash_file
from nc_dist.world import World

MANIFEST = "manifest.json"
MARK = "written_by_rank_"
KEEP = 2  # newest checkpoints; the best one is kept besides


def save(
    folder: Path,
    engine: Engine,
    step: int,
    state: dict[str, Any],
    world: World,
    *,
    best: bool = False,
    keep: int | None = KEEP,
    beside: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Save at `step`; every rank calls it. `state` is small and the same on all ranks.

    `keep` newest checkpoints stay, None for all; `beside` writes what else belongs to it, and is called on every rank.
    """
    partial, final = folder / f"step_{step}.partial", folder / f"step_{step}"
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    engine.save(partial, state)
    beside(partial)
    (partial / f"{MARK}{world.rank}").touch()
    world.barrier()
    if world.rank == 0:
        marks = list(partial.glob(f"{MARK}*"))
        if len(marks) < world.size:
            raise RuntimeError(f"{partial}: only {len(marks)} of {world.size} ranks wrote here; is it shared storage?")
        files = {
            str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        (partial / MANIFEST).write_text(json.dumps({"step": step, "world_size": world.size, "files": files}))
        if final.exists():
            shutil.rmtree(final)  # the same step, saved before a crash and reached again
        partial.rename(final)
        _link(folder, "last", final)
        if best:
            _link(folder, "best", final)
        _prune(folder, keep)
    world.barrier()
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint; damaged ones are passed over, with a line about each on the console."""
    for path in reversed(_complete(folder)):
        faults = verify(path)
        if not faults:
            return path
        print(f"checkpoint {path} is damaged and passed over: {'; '.join(faults)}", flush=True)
    return None


def step_of(path: Path | None) -> int:
    """The step a checkpoint was saved at; 0 for none."""
    return int(path.name.removeprefix("step_")) if path else 0


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint; empty when every file has the size and hash that was written."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"no readable manifest ({error})"]
    return [
        f"{name}: missing or changed"
        for name, written in files.items()
        if not (path / name).is_file()
        or (path / name).stat().st_size != written["bytes"]
        or hash_file(path / name) != written["sha256"]
    ]


def _complete(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=step_of)


def _link(folder: Path, name: str, target: Path) -> None:
    """Move a relative link in one step, so that it never points nowhere."""
    fresh = folder / f"{name}.new"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target.name)
    os.replace(fresh, folder / name)


def _prune(folder: Path, keep: int | None) -> None:
    best = (folder / "best").resolve()
    for path in _complete(folder)[:-keep] if keep else []:
        if path.resolve() != best:
            shutil.rmtree(path)
