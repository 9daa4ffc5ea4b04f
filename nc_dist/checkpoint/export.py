"""The exported weights of a checkpoint, and what a folder of checkpoints holds. For the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from nc_dist.checkpoint.manifest import STEP, checkpoints_in, newest_sound, read_manifest, step_of, verify
from nc_dist.checkpoint.places import Place
from nc_dist.checkpoint.retention import BEST, LAST, linked_step
from nc_dist.errors import InputError

EXPORTS = ("export", "export_ema")
REMEDY = "name another one with --which step_N; a finished run's own weights are in its folder export/"


class Checked(NamedTuple):
    """A checkpoint and what is wrong with it."""

    place: Place
    step: int
    world_size: int | None
    bytes: int
    faults: list[str]


def checked(path: str) -> Iterator[Checked]:
    """Every checkpoint of a run, a checkpoints folder, one step_N or a URL, newest last; InputError without any."""
    for place in _all_in(path):
        faults = verify(place)
        try:
            manifest = read_manifest(place)
            world_size, files = manifest.get("world_size"), manifest["files"]
        except ValueError:
            world_size, files = None, {}
        yield Checked(place, step_of(place), world_size, sum(file["bytes"] for file in files.values()), faults)


def export(path: str, which: str, to: Path) -> Place:
    """Copy the exported weights of one checkpoint to a new folder; which checkpoint it was.

    `last` is the newest one whose weights are whole, a line on the console about each passed over. Averaged weights go
    to `to`/export_ema. InputError when there is no such checkpoint, when its weights are damaged, or when `to` is there
    already; its other files may be damaged.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"--to {to}: is there already; name a new folder")
    place = _chosen(path, which)
    files = [PurePosixPath(name) for name in read_manifest(place)["files"]]
    wanted = [file for file in files if file.parts[0] in EXPORTS]
    if not wanted:
        raise InputError(f"{place}: holds no exported weights; the finished run's own are in its folder export/")
    for file in wanted:
        plain = file.parts[0] == EXPORTS[0]
        place.get(str(file), to / (file.relative_to(EXPORTS[0]) if plain else file))
    return place


def _all_in(path: str) -> list[Place]:
    found = checkpoints_in(path)
    if not found:
        raise InputError(f"{path}: no checkpoint there; name a run's folder, its checkpoints/, one step_N, or a URL")
    return found


def _chosen(path: str, which: str) -> Place:
    """`last`, `best` or `step_N` of what lies at `path`, or the one checkpoint that it is; its weights are whole."""
    found = _all_in(path)
    there = ", ".join(place.folder_name for place in found)
    if which == LAST:
        newest = newest_sound(found, EXPORTS)
        if newest is None:
            raise InputError(f"{path}: the weights of all its checkpoints, {there}, are damaged; {REMEDY}")
        return newest
    if len(found) > 1 or found[0].folder_name != Place(path).folder_name:
        step = _best_step(found) if which == BEST else which.removeprefix(STEP)
        if step is None:
            raise InputError(f"--which {which}: it is not known which was best on the hold-out; {path} holds {there}")
        found = [place for place in found if str(step_of(place)) == str(step)]
        if not found:
            raise InputError(f"--which {which}: no such checkpoint, {STEP}{step}; {path} holds {there}")
    faults = verify(found[0], EXPORTS)
    if faults:
        raise InputError(f"{found[0]}: damaged: {'; '.join(faults)}; {REMEDY}")
    return found[0]


def _best_step(found: list[Place]) -> int | None:
    """The step of the best checkpoint so far: the link's here, else what the newest readable manifest says."""
    linked = None if found[-1].is_remote else linked_step(Path(found[-1].name).parent, BEST)
    if linked is not None:
        return linked
    for place in reversed(found):
        with suppress(ValueError):
            best: int | None = read_manifest(place).get("state", {}).get("best_step")
            return best
    return None
