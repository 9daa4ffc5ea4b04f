"""One group of processes at a time writes to a run's folder: a lease in the folder, held and renewed by rank 0.

The lease is a file that is made exclusively and touched every few seconds. It is taken over when its holder is dead,
belongs to the same start of the run (a restarted group), or has not touched it for a minute by the observer's own
clock: clocks of machines need not agree. Whoever finds that the file is another one has lost the lease and ends. Not
covered: a holder that was suspended for more than a minute may write for the few seconds until it looks, and so may the
old rank 0 of the same start that is cut off from the others, for up to BEAT_S; storage without exclusive creation and
renaming, such as mounted buckets; other ranks of a group whose rank 0 lost its lease, until their next collective.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from nc_dist.errors import FAILED, InputError

FILE = "lease.json"
BEAT_S = 5.0
STALE_S = 60.0  # without a touch, and the holder is taken for gone
LOOK_S = 0.5


class Held(InputError):
    """Another run writes to the folder: what it says of itself there is its own."""


class Holder(NamedTuple):
    """Who holds a lease: the start of the run it belongs to, and a process."""

    owner: str
    pid: int
    host: str
    machine: str  # processes with the same value see the same process ids


class Seen(NamedTuple):
    """A lease as it was found: two that are equal mean that nobody touched it in between."""

    holder: Holder | None  # None: it cannot be read, as when it is being written
    inode: int
    touched_ns: int


def owner() -> str:
    """A name for one start of a run: its restarted groups keep it, another start has another."""
    return uuid.uuid4().hex


def free(out: Path, owner: str, tell: Callable[[str], object] = print) -> None:
    """Wait until nobody else writes to `out`, and remove the lease of a holder that is gone.

    Held when somebody still writes after a minute.
    """
    old, aside = _waited(out, owner, tell), out / f"{FILE}.{uuid.uuid4().hex}"
    if old is not None and _look(out / FILE) == old:
        with suppress(FileNotFoundError):  # another one was faster; if its new lease goes here, it notices and ends
            (out / FILE).rename(aside)
            aside.unlink()


def _waited(out: Path, owner: str, tell: Callable[[str], object]) -> Seen | None:
    """The lease that may be taken over, as soon as there is no other; None where there is none."""
    newest = _look(out / FILE)
    began = since = time.monotonic()
    if newest is not None and not _is_free(newest, owner):
        tell(f"{_who(newest)} holds {out}: waiting up to {STALE_S:.0f} s for its end")
    while newest is not None and not _is_free(newest, owner):
        now = time.monotonic()
        if now - since >= STALE_S:
            break
        if now - began >= STALE_S and now - since < 3 * BEAT_S:
            raise Held(f"out={out}: {_who(newest)} writes to it; wait for its end, stop it, or choose another")
        time.sleep(LOOK_S)
        if (found := _look(out / FILE)) != newest:
            newest, since = found, time.monotonic()
    return newest


@contextmanager
def held(out: Path, owner: str, tell: Callable[[str], object] = print) -> Iterator[None]:
    """Hold the lease of `out` while the block runs. Ends this process when another one takes it over."""
    file = _take(out, owner, tell)
    done = threading.Event()

    def keep() -> None:
        while not done.wait(BEAT_S):
            if not _touched(out, file) and not done.is_set():
                tell(f"another process has taken over {out}: this one ends")
                os._exit(FAILED)

    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=BEAT_S)
        with suppress(OSError):
            if _is_ours(out, file):
                (out / FILE).unlink()
        os.close(file)


def is_held(out: Path) -> bool:
    """Whether a process holds the lease that is not known to be dead."""
    seen = _look(out / FILE)
    return seen is not None and not _is_dead(seen)


def _take(out: Path, owner: str, tell: Callable[[str], object]) -> int:
    """Make the lease; its open file."""
    text = json.dumps(Holder(owner, os.getpid(), socket.gethostname(), _machine())._asdict())
    while True:
        free(out, owner, tell)
        with suppress(FileExistsError):
            file = os.open(out / FILE, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            os.write(file, text.encode())
            os.fsync(file)
            return file


def _touched(out: Path, file: int) -> bool:
    """Touch our lease; False when it is no longer the one in the folder."""
    try:
        os.utime(file)
        return _is_ours(out, file)
    except OSError as error:  # storage that hangs for a moment is no loss; a file that is gone from the server is
        return error.errno != errno.ESTALE


def _look(path: Path) -> Seen | None:
    """The lease as it is; None where there is none. The file is opened, since that is when NFS asks the server."""
    try:
        with path.open() as file:
            text, stat = file.read(), os.fstat(file.fileno())
    except OSError:
        return None
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        holder = None
    return Seen(holder, stat.st_ino, stat.st_mtime_ns)


def _is_free(seen: Seen, owner: str) -> bool:
    return _is_dead(seen) or (seen.holder is not None and seen.holder.owner == owner)


def _is_dead(seen: Seen) -> bool:
    """Whether the holder is a process of this machine that is no more."""
    if seen.holder is None or seen.holder.machine != _machine():
        return False
    try:
        os.kill(seen.holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _is_ours(out: Path, file: int) -> bool:
    try:
        return (out / FILE).stat().st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False


def _who(seen: Seen) -> str:
    return f"process {seen.holder.pid} on {seen.holder.host}" if seen.holder else "a process"


def _machine() -> str:
    """What tells apart the process tables of machines and containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
