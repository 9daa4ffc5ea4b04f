"""What a complete checkpoint is: a folder step_N whose manifest names every file with its size and hash.

`{"step": N, "world_size": W, "state": {..}, "files": {name: {"bytes": .., "sha256": ..}}}`; the state is what the
engine's own files hold too, here readable without any engine.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nc_dist.checkpoint.places import Place
from nc_dist.errors import InputError

MANIFEST = "manifest.json"
STEP = "step_"
THREADS = 8  # that read files of one checkpoint


def step_of(path: Path | Place | None) -> int:
    """The step a checkpoint was saved at; 0 for none. Of a link, that of its target."""
    if path is None:
        return 0
    name = path.folder_name if isinstance(path, Place) else path.resolve().name
    return int(name.removeprefix(STEP))


def is_step(name: str) -> bool:
    """Whether a folder of this name is a checkpoint: step_20, not step_20.partial."""
    return name.startswith(STEP) and name.removeprefix(STEP).isdecimal()


def checkpoints_in(place: str | Path) -> list[Place]:
    """The checkpoints that a run folder, a checkpoints folder or a checkpoint itself holds, in the order of steps.

    Here every step_N counts; behind a URL only those with a manifest, as one without is a copy that never ended.
    """
    here = Place(place)
    if is_step(here.folder_name):
        return [here] if here.names() else []
    for folder in (here, here / "checkpoints"):
        steps = sorted(int(name.removeprefix(STEP)) for name in folder.names() if is_step(name))
        if steps:
            found = [folder / f"{STEP}{step}" for step in steps]
            return [each for each in found if not each.is_remote or MANIFEST in each.names()]
    return []


def read_manifest(checkpoint: str | Path | Place) -> dict[str, Any]:
    """The manifest; ValueError when there is none, or none that can be read."""
    place = checkpoint if isinstance(checkpoint, Place) else Place(checkpoint)
    try:
        manifest = json.loads(place.read(MANIFEST))
        if not (isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)):
            raise ValueError("not a checkpoint's")
    except (OSError, ValueError) as error:
        raise ValueError(f"no readable manifest ({error})") from None
    return manifest


def saved_state(checkpoint: str | Path | Place) -> dict[str, Any]:
    """What the checkpoint says of itself and of where it stands; InputError when it says nothing."""
    try:
        state = read_manifest(checkpoint)["state"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{checkpoint}: not a checkpoint that can be gone on from: {error}") from None
    return state  # type: ignore[no-any-return]


def verify(checkpoint: str | Path | Place, folders: Collection[str] = ()) -> list[str]:
    """What is wrong with a checkpoint; empty when every file has the size and hash that was written.

    With `folders` only the manifest and what lies in these is looked at.
    """
    place = checkpoint if isinstance(checkpoint, Place) else Place(checkpoint)
    try:
        files = read_manifest(place)["files"]
    except ValueError as error:
        return [str(error)]

    def fault(name: str) -> str | None:
        try:
            size, sha256 = place.fingerprint(name)
        except OSError as error:
            return f"{name}: missing" if isinstance(error, FileNotFoundError) else f"{name}: {error}"
        wanted = files[name]
        if size != wanted["bytes"]:
            return f"{name}: {size} bytes, {wanted['bytes']} were written"
        return None if sha256 == wanted["sha256"] else f"{name}: other bytes than were written"

    with ThreadPoolExecutor(THREADS) as pool:
        looked_at = [name for name in files if not folders or name.partition("/")[0] in folders]
        return [found for found in pool.map(fault, looked_at) if found]


def latest(folder: Path) -> Path | None:
    """The newest sound checkpoint; damaged ones are passed over, with a line about each on the console."""
    found = newest_sound(checkpoints_in(folder))
    return Path(found.name) if found else None


def newest_sound(checkpoints: list[Place], folders: Collection[str] = ()) -> Place | None:
    """The last one without a fault (in these `folders`); a line on the console about each that is passed over."""
    for checkpoint in reversed(checkpoints):
        faults = verify(checkpoint, folders)
        if not faults:
            return checkpoint
        print(f"checkpoint {checkpoint} is damaged and passed over: {'; '.join(faults)}", flush=True)
    return None
