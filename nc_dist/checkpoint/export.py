"""The exported weights of a checkpoint, and what a folder of checkpoints holds. For the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from nc_dist.checkpoint.manifest import checkpoints_in, read_manifest, step_of, verify
from nc_dist.checkpoint.places import Place
from nc_dist.checkpoint.retention import BEST, LAST
from nc_dist.errors import InputError

EXPORTS = ("export", "export_ema")


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

    With averaged weights these go to `to`/export_ema. InputError when there is no such checkpoint, when it is damaged,
    or when `to` is there already.
    """
    place = _chosen(path, which)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"--to {to}: is there already; name a new folder")
    faults = verify(place)
    if faults:
        raise InputError(f"{place}: damaged: {'; '.join(faults)}")
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
    """`last`, `best` or `step_N` of what lies at `path`; what a URL's newest checkpoint says is best there."""
    found = _all_in(path)
    if which == LAST or (len(found) == 1 and found[0].folder_name == Place(path).folder_name):
        return found[-1]
    step = str(read_state_best(found[-1])) if which == BEST else which.removeprefix("step_")
    for place in found:
        if str(step_of(place)) == step:
            return place
    there = ", ".join(place.folder_name for place in found)
    why = "none was best on the hold-out" if which == BEST and step == "None" else "no such checkpoint"
    raise InputError(f"--which {which}: {why}; {path} holds {there}")


def read_state_best(newest: Place) -> int | None:
    """The step of the best checkpoint so far, as the newest one says."""
    try:
        step: int | None = read_manifest(newest).get("state", {}).get("best_step")
    except ValueError as error:
        raise InputError(f"{newest}: {error}") from None
    return step
