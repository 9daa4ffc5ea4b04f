"""The folder of a run: what belongs to it, whether it is finished, and how it ended. No torch, no ray.

run.yaml  env.json  status.json  metrics.jsonl  result.json  tb/  checkpoints/  export/
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from nc_dist.errors import EXPORT_REMEDY, InputError
from nc_dist.identity import differences, spec_hash
from nc_dist.spec import Spec, dump

RESULT, STATUS, RUN = "result.json", "status.json", "run.yaml"
STOP = "stop"  # a file that asks the run to save and end
FRESH = "fresh"  # a file that says that the run was begun anew
PACKAGES = ("torch", "torchvision", "deepspeed", "ray", "webdataset", "tensorboard", "numpy", "nc-dist")


def prepare(spec: Spec, fresh: bool = False) -> Path:
    """Make the run's folder, or take up the one that is there.

    InputError when it belongs to another configuration, with the differences; `fresh` moves such a folder aside.
    """
    out = Path(spec.out)  # type: ignore[attr-defined]
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out}: a file is in the way; choose another folder")
    if fresh and out.exists():
        stamp = time.strftime("%Y%m%d-%H%M%S")
        names = (f"{out.name}.{stamp}{f'-{i}' if i else ''}" for i in itertools.count())
        aside = next(path for name in names if not (path := out.with_name(name)).exists())
        out.rename(aside)
        print(f"moved the old {out} to {aside}")
    check_same(spec, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out}: cannot be made ({error.strerror}); choose another folder") from None
    (out / STOP).unlink(missing_ok=True)
    if fresh:
        (out / FRESH).touch()
    write_whole(out / RUN, dump(spec))
    write_whole(out / "env.json", json.dumps(environment(), indent=1))
    return out


def check_same(spec: Spec, out: Path) -> None:
    """InputError when `out` holds a run of another configuration."""
    if not (out / RUN).is_file():
        return
    old, new = yaml.safe_load((out / RUN).read_text()), spec.model_dump(mode="json", by_alias=True)
    if spec_hash(old) != spec_hash(new):
        lines = "\n    ".join(differences(old, new))
        raise InputError(
            f"out={out}: belongs to another configuration:\n    {lines}\n  Choose another out (or --name), "
            f"or give --fresh to move the old folder aside{_weights_remedy(lines, out)}"
        )


def _weights_remedy(lines: str, out: Path) -> str:
    """Checkpoints do not go over to another engine, ZeRO stage or micro-batch; their weights do."""
    if not any(key in lines for key in ("engine.zero:", "engine.kind:", "batch.micro:", "batch.global:")):
        return ""
    return f". {EXPORT_REMEDY.format(out)}"


def result_of(out: Path) -> dict[str, Any] | None:
    """The result of a finished run, None for any other."""
    try:
        return json.loads((out / RESULT).read_text())  # type: ignore[no-any-return]
    except (OSError, json.JSONDecodeError):
        return None


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Commit: from here on the run is finished."""
    write_whole(out / RESULT, json.dumps(result, indent=1))


def write_status(out: Path, state: str, code: int | None, reason: str = "", resume: str = "") -> None:
    """How things stand, for people and for `ray job submit`, which knows only success and failure.

    States: running, done, failed, bad_input, preempted, interrupted, terminated.
    """
    tree = {
        "state": state,
        "code": code,
        "reason": reason,
        "resume": resume,
        "time": time.time(),
        "pid": os.getpid(),
    }
    write_whole(out / STATUS, json.dumps(tree, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


def appears(path: Path) -> bool:
    """Whether a file that another machine may make is there by now.

    NFS remembers for up to a minute that a name is not there; it asks the server again once the folder is opened.
    """
    with suppress(OSError), os.scandir(path.parent):
        return path.exists()
    return False


def environment() -> dict[str, Any]:
    """What the run ran on."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    """Of the code, not of the working directory; None where the package is not a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
