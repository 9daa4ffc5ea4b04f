"""Copies of committed checkpoints behind a URL, made while training goes on; and the way back.

An object store cannot rename: there a checkpoint is its files and, written last, its manifest. Without one it is a copy
that never ended, and is not looked at. Rank 0 copies the files of all ranks, so they lie on storage that it sees.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

from nc_dist.checkpoint.manifest import MANIFEST, STEP, checkpoints_in, is_step, read_manifest, step_of, verify
from nc_dist.checkpoint.places import Place
from nc_dist.checkpoint.retention import BEST, LAST, PARTIAL, Retention, discard, link, linked_step
from nc_dist.world import World

ATTEMPTS = 5
WAIT_S = 1.0  # before the second attempt; twice as long before each further one
STOP_WAIT_S = 10.0  # that a stop waits for the last copy
POLL_S = 1.0

T = TypeVar("T")


class Uploads:
    """Copies the checkpoints of `folder` to `url`, one after the other, in a thread of rank 0; nothing without a URL.

    What fails is tried again, then told and counted; it never ends a run. One that retention removes here before its
    turn comes is passed over.
    """

    def __init__(self, url: str | None, folder: Path, retention: Retention, world: World) -> None:
        self._folder, self._retention, self._world = folder, retention, world
        self._place = Place(url) if url and world.rank == 0 else None
        self._waiting: Queue[int | None] = Queue()
        self._current: int | None = None
        self._done: list[int] = []
        self._failed: dict[int, str] = {}
        self._thread = threading.Thread(target=self._work, daemon=True)
        if self._place is not None:
            self._thread.start()
            for checkpoint in checkpoints_in(folder):  # an earlier attempt may have ended before they were copied
                self.add(step_of(checkpoint))

    @property
    def in_use(self) -> set[int]:
        """The step that is being copied just now."""
        return set() if self._current is None else {self._current}

    def add(self, step: int) -> None:
        """Copy this checkpoint as soon as those before it are through."""
        if self._place is not None:
            self._waiting.put(step)

    def close(
        self, stop: Callable[[], bool] = lambda: False, alive: Callable[[], object] = lambda: None
    ) -> dict[str, Any] | None:
        """Wait for the last copy; every rank calls it. {url, uploaded: steps, failed: {step: reason}} on rank 0.

        Once `stop()` is true on rank 0, for STOP_WAIT_S only: None, on every rank, when copies are missing then. The
        next start makes them. `alive` is called now and then while this waits.
        """
        ends = math.inf
        if self._place is not None:
            self._waiting.put(None)
        while self._world.broadcast(self._thread.is_alive() and time.monotonic() < ends):
            alive()
            if self._place is not None:
                self._thread.join(POLL_S)
                ends = min(ends, time.monotonic() + STOP_WAIT_S) if stop() else ends
        if self._world.broadcast(self._thread.is_alive()):
            if self._place is not None:
                _tell(f"not all checkpoints are copied to {self._place} yet: the same command copies the rest")
            return None
        if self._place is None:
            return {}
        for step, reason in self._failed.items():
            print(f"error: upload of step_{step} to {self._place} failed: {reason}; it is whole here", file=sys.stderr)
        failed = {str(step): reason for step, reason in self._failed.items()}
        return {"upload": {"url": str(self._place), "uploaded": self._done, "failed": failed}}

    def _work(self) -> None:
        assert self._place is not None
        while (step := self._waiting.get()) is not None:
            self._current = step
            checkpoint = self._folder / f"{STEP}{step}"
            try:
                self._copy(checkpoint, self._place)
            except Exception as error:  # whatever a store may raise: training goes on
                if checkpoint.is_dir():
                    self._failed[step] = f"{type(error).__name__}: {error}"
                    _tell(f"upload of {checkpoint.name} failed for good after {ATTEMPTS} attempts: {error}")
            self._current = None

    def _copy(self, checkpoint: Path, place: Place) -> None:
        if not checkpoint.is_dir():
            return
        retried(lambda: upload(checkpoint, place / checkpoint.name), f"upload of {checkpoint.name}")
        self._done.append(step_of(checkpoint))
        self._failed.pop(step_of(checkpoint), None)
        best = linked_step(self._folder, BEST)
        if best in (None, *self._done):
            newest = max(map(step_of, checkpoints_in(self._folder)))
            retried(lambda: prune_remote(place, self._retention, newest, best), "pruning what was uploaded")


def upload(checkpoint: Path, target: Place) -> None:
    """Copy one checkpoint, its manifest last; nothing to do where that very manifest is there already."""
    manifest = (checkpoint / MANIFEST).read_bytes()
    if MANIFEST in target.names():
        if target.read(MANIFEST) == manifest:
            return
        target.remove(MANIFEST)
    for name in read_manifest(checkpoint)["files"]:
        target.put(checkpoint / name, name)
    target.put(checkpoint / MANIFEST, MANIFEST)


def prune_remote(place: Place, retention: Retention, newest: int, best: int | None) -> None:
    """Remove what need not stay, `newest` being the newest here, and copies that never ended; the manifests first."""
    staying = retention.staying(map(step_of, checkpoints_in(place.name)), newest, best)
    for name in place.names():
        if is_step(name) and int(name.removeprefix(STEP)) not in staying:
            (place / name).remove(MANIFEST)
            place.remove(name)


def fetch(checkpoint: Place, folder: Path) -> Path:
    """Bring a checkpoint from a URL into `folder`, its hashes checked; OSError when it cannot be had whole."""
    final = folder / checkpoint.folder_name
    partial = final.with_name(final.name + PARTIAL)
    discard(partial)  # of an attempt that was interrupted
    for name in (*read_manifest(checkpoint)["files"], MANIFEST):
        retried(lambda name=name: checkpoint.get(name, partial / name), f"{checkpoint}/{name}")  # type: ignore[misc]
    faults = verify(partial)
    if faults:
        raise OSError(f"{checkpoint}: {'; '.join(faults)}")
    discard(final)  # damaged, or brought by an attempt that ended before it saved one of its own
    partial.rename(final)
    return final


def fetch_newest(checkpoints: list[Place], folder: Path, after: int = 0) -> Path | None:
    """The newest whole one of a run's checkpoints behind a URL, and the best one, brought into `folder` with links.

    None when there is none of a step beyond `after`, or when none of those can be had.
    """
    for checkpoint in reversed(checkpoints):
        if step_of(checkpoint) <= after or (newest := _fetched(checkpoint, folder)) is None:
            continue
        link(folder, LAST, newest.name)
        best = read_manifest(newest).get("state", {}).get("best_step")
        for other in checkpoints:
            if step_of(other) == best and (there := newest if other is checkpoint else _fetched(other, folder)):
                link(folder, BEST, there.name)
        return newest
    return None


def _fetched(checkpoint: Place, folder: Path) -> Path | None:
    """Brought into `folder`; None, with a line on the console, when it cannot be had whole."""
    try:
        return fetch(checkpoint, folder)
    except (OSError, ValueError) as error:
        _tell(f"checkpoint {checkpoint} is damaged and passed over: {error}")
        return None


def retried(call: Callable[[], T], what: str) -> T:
    """call(), again after an OSError, ATTEMPTS times in all, each failure told."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except OSError as error:
            _tell(f"{what}: attempt {attempt} of {ATTEMPTS} failed: {error}")
            time.sleep(WAIT_S * 2 ** (attempt - 1))
    return call()


def _tell(line: str) -> None:
    print(line, flush=True)
