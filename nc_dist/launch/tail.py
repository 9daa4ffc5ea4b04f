"""Follows a text file that another process adds lines to, and a run's notices: what workers elsewhere have to tell."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NOTICES = "notices.txt"
POLL_S = 0.5


def note(out: Path, text: str) -> None:
    """Add a line to the run's notices, and print it: on Ray the driver shows what workers and controller note.

    What is to be told may be that the disk is full: a line that cannot be added is printed all the same.
    """
    print(text, flush=True)
    with suppress(OSError), (out / NOTICES).open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


@contextmanager
def following(path: Path, show: Callable[[str], object]) -> Iterator[None]:
    """Call `show` with each whole line that `path` gains while the block runs, from a thread; with the last ones too.

    A file that is cut back is followed from its new end.
    """
    done = threading.Event()
    offset = _size(path)

    def work() -> None:
        nonlocal offset
        ended = False
        while not ended:
            ended = done.wait(POLL_S)  # one more look after the end
            offset = min(offset, _size(path))
            if _size(path) > offset:
                with path.open("rb") as file:
                    file.seek(offset)
                    whole, newline, _ = file.read().rpartition(b"\n")
                offset += len(whole + newline)
                for line in whole.splitlines():
                    show(line.decode(errors="replace"))

    thread = threading.Thread(target=work, name=f"following {path.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
