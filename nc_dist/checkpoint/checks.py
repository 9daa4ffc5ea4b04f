"""What can be wrong with the checkpoints of a pre-training run, found before it starts, and their part of its plan."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nc_dist.checkpoint.resume import CHECKPOINTS, check_given
from nc_dist.config import PretrainRun
from nc_dist.errors import InputError
from nc_dist.plan import as_bytes
from nc_dist.source_set import SourceSet


def check_checkpoints(run: PretrainRun, data: SourceSet, one: int) -> dict[str, Any]:
    """Where the run begins and what its checkpoints of `one` byte count each take; InputError for what cannot be."""
    outside = [epoch for epoch in run.keep_epochs if not 0 < epoch <= run.epochs]
    if outside:
        raise InputError(f"keep_epochs={list(run.keep_epochs)}: {outside[0]:g} is not in 0..epochs={run.epochs:g}")
    free = free_bytes(Path(run.out) / CHECKPOINTS)
    check_disk(run.out, one, free)
    begins = check_given(run, data)
    plan = {"begins at": begins} if begins else {}
    return plan | {"a checkpoint": f"{as_bytes(one)}, about; {as_bytes(free)} are free at {run.out}"}


def check_disk(out: str, one: int, free: int) -> None:
    """InputError when `free` bytes are less than `one` checkpoint needs."""
    if free < one:
        raise InputError(
            f"out={out}: {as_bytes(free)} are free there, and one checkpoint needs about {as_bytes(one)}; make room, "
            "or name a folder on another disk"
        )


def free_bytes(folder: Path) -> int:
    """On the disk where the folder is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
