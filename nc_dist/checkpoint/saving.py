"""A checkpoint is complete or not there at all: written by all ranks, committed by one.

Phase one: every rank writes its files into step_N.partial, and hashes them. Phase two: rank 0 sees that all that was
written is there, writes the manifest, renames the folder to step_N and moves the links. A fault on any rank ends the
save on all of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from nc_dist.checkpoint.manifest import MANIFEST, STEP, latest
from nc_dist.checkpoint.retention import LAST, PARTIAL, Retention, discard, link, link_best, prune
from nc_dist.checkpoint.shared_faults import Faults, on_all
from nc_dist.engine import Engine
from nc_dist.identity import hash_file
from nc_dist.world import World

Fingerprint = tuple[str, int, str]  # name, bytes, sha256


class SaveFailed(RuntimeError):
    """A checkpoint could not be written: the same on every rank, and nothing is left of it."""


def save(
    folder: Path,
    engine: Engine,
    step: int,
    state: dict[str, Any],
    world: World,
    *,
    best: int | None = None,
    retention: Retention = Retention(),  # noqa: B008  (frozen)
    in_use: Collection[int] = (),
    beside: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Save at `step`; every rank calls it. `state` is small, plain JSON; rank 0's is written.

    `best` is the step of the best checkpoint so far, where that is known: the link `best` points to it. Steps
    `in_use` are not pruned this time; `beside` writes what else belongs to the checkpoint, and is called on every rank.
    Raises SaveFailed on all ranks when any of them could not write.
    """
    partial = folder / f"{STEP}{step}{PARTIAL}"
    first = world.rank == 0
    try:
        on_all(world, lambda: _empty(partial) if first else None)
        written = on_all(world, lambda: engine.save(partial, state))
        on_all(world, lambda: beside(partial))
        others = set(chain(*written[1:]))
        mine = [path for path in _files(partial) if path not in others] if first else written[world.rank]
        prints = on_all(world, lambda: [_fingerprint(path, partial) for path in mine])
        on_all(world, lambda: _commit(partial, step, state, prints, best, retention, in_use) if first else None)
    except Faults as faults:
        _give_up(partial, step, faults, world)
    return folder / f"{STEP}{step}"


def _give_up(partial: Path, step: int, faults: Faults, world: World) -> NoReturn:
    """Remove what was written, and say what is left and what to do."""
    text = ""
    if world.rank == 0:
        free = shutil.disk_usage(partial.parent).free / 1e6 if partial.parent.is_dir() else 0.0
        shutil.rmtree(partial, ignore_errors=True)
        whole = latest(partial.parent)
        left = f"{whole} is whole" if whole else "there is no earlier checkpoint"
        text = (
            f"step {step}: the checkpoint could not be written ({faults}); {free:.6g} MB were free then. {left}: make "
            "room, a smaller `keep` does too, and give the same command again, which goes on from there"
        )
    raise SaveFailed(world.broadcast(text))


def _empty(partial: Path) -> None:
    discard(partial)
    partial.mkdir(parents=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path, base: Path) -> Fingerprint:
    """Of a file that is on the disk, not only on its way there."""
    _sync(path)
    return str(path.relative_to(base)), path.stat().st_size, hash_file(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _commit(
    partial: Path,
    step: int,
    state: dict[str, Any],
    prints: list[list[Fingerprint]],
    best: int | None,
    retention: Retention,
    in_use: Collection[int],
) -> None:
    """Phase two, on rank 0: from the rename on there is a checkpoint."""
    found = list(chain(*prints))
    _check_there(partial, found)
    files = {name: {"bytes": size, "sha256": sha256} for name, size, sha256 in sorted(found)}
    manifest = {"step": step, "world_size": len(prints), "state": state, "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (partial / MANIFEST, *(path for path in partial.rglob("*") if path.is_dir()), partial):
        _sync(path)
    folder, final = partial.parent, partial.with_name(f"{STEP}{step}")
    discard(final)  # one that was damaged and passed over, and is now reached again
    partial.rename(final)
    _sync(folder)
    link(folder, LAST, final.name)
    link_best(folder, best)
    prune(folder, retention, step, in_use)


def _check_there(partial: Path, found: Iterable[Fingerprint]) -> None:
    for name, size, _ in found:
        path = partial / name
        if not path.is_file() or path.stat().st_size != size:
            raise RuntimeError(f"{path}: another rank wrote it, it is not there; is the folder on shared storage?")
