"""Ends a group of processes in which one hangs, after it has said which one, at which step and in what.

The training loop tells `at(step, phase)`; a thread of each rank looks. Where a phase takes too long, every rank writes
<out>/hangs/rank_R.txt with the stacks of its threads. A rank that writes none is stopped altogether, or its machine is
gone; else the one that is furthest behind keeps the others waiting. Then the process ends, and whoever started it
starts the group again. No torch: the report must come though everything else hangs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nc_dist.errors import FAILED
from nc_dist.run_folder import appears

HANGS, VERDICT = "hangs", "verdict.txt"
BETWEEN = "between steps"  # measuring, saving, exporting
PHASES = ("starting", "reading", "gradients", "update", BETWEEN)  # of a step, in their order
LONGER = 4  # times as long may take what lies between steps
LOOKS = 4  # at least, in the time that a phase may take
LOOK_S = 5.0  # at most, from look to look
GRACE_LOOKS = 3  # in which the other ranks see that one has reported, and report as well
LAST_RESORT_LOOKS = 60  # then the process ends though its report cannot be written

At = Callable[[int, str], object]


def longest(hang_s: float) -> int:
    """Seconds that a rank may have to wait for the others in a collective before the watchdog has spoken."""
    return int(LONGER * hang_s + (GRACE_LOOKS + LAST_RESORT_LOOKS) * LOOK_S) + 1


def clear(out: Path) -> None:
    """Put the reports of an earlier attempt aside; one rank does it, before any other watches."""
    folder = out / HANGS
    if folder.exists():
        folder.rename(folder.with_name(f"{HANGS}.{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}"))


@contextmanager
def watching(out: Path, rank: int, size: int, hang_s: float, tell: Callable[[str], object]) -> Iterator[At]:
    """Watch this rank while the block runs; yields what the loop tells where it is.

    A phase may take `hang_s` seconds, what lies between steps LONGER times that; what comes before the first step is
    not watched. `tell` gets the line that names rank, step and phase, on one rank.
    """
    dog = _Watchdog(out / HANGS, rank, size, hang_s, tell)
    thread = threading.Thread(target=dog.look_out, name="watchdog", daemon=True)
    thread.start()
    try:
        yield dog.at
    finally:
        dog.ended.set()
        thread.join()


class _Watchdog:
    def __init__(self, folder: Path, rank: int, size: int, hang_s: float, tell: Callable[[str], object]) -> None:
        self.folder, self.rank, self.size, self.hang_s, self.tell = folder, rank, size, hang_s, tell
        self.look_s = min(LOOK_S, hang_s / LOOKS)
        self.ended = threading.Event()
        self._place = (0, PHASES[0])

    def at(self, step: int, phase: str) -> None:
        self._place = (step, phase)  # a new object each time: the thread sees that something happened

    def look_out(self) -> None:
        """Time is counted in looks: a process that was itself stopped for a while is not one that hangs."""
        began = seen = self._place
        looks, reported = 0, False
        while not self.ended.wait(self.look_s):
            looks = looks + 1 if self._place is seen else 0
            seen = self._place
            seconds = looks * self.look_s
            overdue = seen is not began and seconds >= self.hang_s * (LONGER if seen[1] == BETWEEN else 1)
            if overdue:
                faulthandler.dump_traceback_later(LAST_RESORT_LOOKS * self.look_s, exit=True)
            if overdue or (not reported and appears(self.folder)):
                self._report(*seen, seconds)
                reported = True
            if overdue:
                if not self.ended.wait(GRACE_LOOKS * self.look_s):
                    self._conclude()
                    os._exit(FAILED)
                faulthandler.cancel_dump_traceback_later()

    def _report(self, step: int, phase: str, seconds: float) -> None:
        self.folder.mkdir(exist_ok=True)
        head = {"rank": self.rank, "step": step, "phase": phase, "seconds": round(seconds, 1)}
        partial = self.folder / f"rank_{self.rank}.partial"
        with partial.open("w") as file:
            file.write(json.dumps({**head, "host": socket.gethostname(), "pid": os.getpid()}) + "\n")
            file.flush()
            faulthandler.dump_traceback(file)
        partial.replace(report_of(self.folder, self.rank))

    def _conclude(self) -> None:
        """Tell the verdict, unless another rank has told it."""
        with suppress(FileExistsError), (self.folder / VERDICT).open("x") as file:
            line = verdict(self.folder, self.size)
            file.write(line)
            self.tell(line)


def report_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.txt"


def verdict(folder: Path, size: int) -> str:
    """The line that names what hangs, from the reports of `size` ranks: who gave none, else who is furthest behind."""
    heads = [_head(report_of(folder, rank)) for rank in range(size)]
    told = [head for head in heads if head is not None]
    silent = [rank for rank, head in enumerate(heads) if head is None]
    first = min(map(_place, told), default=(0, 0))
    last = [head for head in told if _place(head) == first]
    where = f"step {first[0]}, {PHASES[first[1]]}"
    if silent:
        return f"hang: {_named(silent)} gives no sign of life, stopped or gone; the others are at {where}; see {folder}"
    files = ", ".join(str(report_of(folder, head["rank"])) for head in last[:3])
    return f"hang: {_named([head['rank'] for head in last])} at {where}, for {last[0]['seconds']:g} s; stacks: {files}"


def _place(head: dict[str, Any]) -> tuple[int, int]:
    return int(head["step"]), PHASES.index(head["phase"])


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _head(report: Path) -> dict[str, Any] | None:
    try:
        with report.open() as file:
            return json.loads(file.readline())  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def verdict_of(out: Path) -> str | None:
    """What the watchdog said of the newest attempt, None when it had nothing to say."""
    with suppress(OSError):
        return (out / HANGS / VERDICT).read_text() or None
    return None
