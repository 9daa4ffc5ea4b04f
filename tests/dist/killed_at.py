"""`nc-dist` that dies by SIGKILL at a marked point of a save: PHASE RANK STEP, then the command's own words.

The points are calls of the standard library and of torch that a save makes; the program itself has no hooks. Started by
torchrun, for tests/parity/test_killed_saves.py.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from nc_dist.cli import main

phase, rank, step, *words = sys.argv[1:]
MARK = f"step_{step}.partial"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(call: Any, when: Any, half: Any = None) -> Any:
    """`call` that kills this process where `when` holds of its arguments, after doing half of its work."""

    def instead(*args: Any, **named: Any) -> Any:
        if os.environ["RANK"] == rank and when(*args, **named):
            if half:
                half(*args)
            die()
        return call(*args, **named)

    return instead


def write_half(state: Any, path: Any) -> None:
    save(state, path)
    os.truncate(path, Path(path).stat().st_size // 2)


def remove_half(path: Path) -> None:
    for file in [file for file in sorted(Path(path).rglob("*")) if file.is_file()][::2]:
        file.unlink()


save = torch.save
if phase == "a rank writes":
    torch.save = dying(save, lambda state, path: MARK in str(path), write_half)
elif phase == "files written":  # before they are hashed and told
    os.fsync = dying(os.fsync, lambda handle: MARK in os.readlink(f"/proc/self/fd/{handle}"))
elif phase == "manifest written":
    Path.rename = dying(Path.rename, lambda self, target: f"{Path(target).name}.partial" == MARK)  # type: ignore[method-assign]
elif phase == "renamed":
    Path.symlink_to = dying(Path.symlink_to, lambda self, target: f"{target}.partial" == MARK)  # type: ignore
elif phase == "pruning":
    shutil.rmtree = dying(shutil.rmtree, lambda path, **_: Path(path).name.startswith(f"step_{step}."), remove_half)
else:
    raise SystemExit(f"no such phase: {phase}")

sys.argv = ["nc-dist", *words]
main()
