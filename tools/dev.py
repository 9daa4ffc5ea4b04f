#!/usr/bin/env python3
"""Sets up the project's virtual environment and runs its demo, tests and checks. Needs only Python.

python3 tools/dev.py demo             one small experiment from start to report
python3 tools/dev.py test             all tests
python3 tools/dev.py test -- -k loss  what follows "--" goes to pytest (or to the demo)
python3 tools/dev.py check            formatting, lint, types, import rules

--venv PATH   use the environment at PATH in place of .venv
--offline     install nothing: use the environment as it is
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = "tools/constraints.txt"
EXTRAS = "test"  # one set for all commands, so that one stamp describes the environment
NEEDED_GB = 9  # 6.5 GB installed, and the downloaded wheels while pip works
HEARTBEAT_S = 20.0
TAIL_LINES = 20
CHECKS = (("ruff", "format", "--check", "."), ("ruff", "check", "."), ("mypy",), ("lint-imports",))

# The first pattern found in the output names the remedy, so the more telling ones come first.
REMEDIES = {
    r"No space left|quota exceeded": "free disk space, or set TMPDIR if only the temporary folder is full",
    r"name resolution|not known|connection broken|timed out|ProxyError|SSLError": (
        "the package index was not reached: check network and proxy, then run the same command again"
    ),
    r"requires a different Python|Requires-Python": "start tools/dev.py with another Python, 3.11 to 3.13",
    r"ResolutionImpossible|No matching distribution": (
        f"a pin in {CONSTRAINTS} contradicts pyproject.toml, or has no wheel for this Python and system"
    ),
    r"": "see the log, then run the same command again: what was downloaded is kept",
}


class Refused(Exception):
    """The machine cannot do what was asked; the message says what is wrong and the remedy."""


def stamp(pyproject: bytes, constraints: bytes, python: str, root: str, extras: str = EXTRAS) -> str:
    """Fingerprints all that decides what an environment holds; root is the checkout it imports."""
    parts = (pyproject, constraints, python.encode(), root.encode(), extras.encode())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def refuse_python(version: tuple[int, int]) -> None:
    """Raises Refused unless the packages support this Python."""
    if not (3, 11) <= version <= (3, 13):
        raise Refused(
            f"Python {version[0]}.{version[1]} cannot run nc_dist, which needs 3.11 to 3.13.\n"
            "Remedy: start this script with one of those, such as: python3.12 tools/dev.py test"
        )


def refuse_missing_venv() -> None:
    """Raises Refused where Python cannot make environments: Debian ships that part separately."""
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        raise Refused("This Python lacks venv or ensurepip.\nRemedy: apt install python3-venv")


def refuse_full_disk(folder: Path) -> None:
    """Raises Refused if a new environment would not fit on this folder's disk."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < NEEDED_GB:
        raise Refused(
            f"{folder} has {free_gb:.1f} GB free; the environment needs about {NEEDED_GB} GB.\n"
            "Remedy: free some space, or choose a folder on a larger disk with --venv PATH"
        )


def remedy(output: str) -> str:
    """Returns what to do about a failed install, judged by its output."""
    return next(advice for pattern, advice in REMEDIES.items() if re.search(pattern, output))


def last_lines(log: Path, count: int) -> list[str]:
    """Returns the last non-empty lines of a log."""
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-count:]


def run(command: Sequence[str], env: dict[str, str], log: Path | None = None) -> int:
    """Runs a command in the repository root, on this console or into a log, and returns its exit code."""
    print("$ " + shlex.join(command).replace(f"{ROOT}/", ""), flush=True)
    if log is None:
        return wait(subprocess.Popen(command, cwd=ROOT, env=env))
    with log.open("wb") as sink:
        code = wait(subprocess.Popen(command, cwd=ROOT, env=env, stdout=sink, stderr=sink), log)
    if code:
        print(f"\nFailed with exit code {code}. The last lines of {log}:")
        print("\n".join(f"  {line}" for line in last_lines(log, TAIL_LINES)))
        print(f"Remedy: {remedy(log.read_text(errors='replace'))}", flush=True)
    return code


def wait(process: subprocess.Popen[bytes], log: Path | None = None) -> int:
    """Waits for a child, with signs of life from its log if it has one."""
    start = time.monotonic()
    try:
        while True:
            try:
                code = process.wait(HEARTBEAT_S if log else None)
                return code if code >= 0 else 128 - code  # as a shell reports a signal
            except subprocess.TimeoutExpired:
                latest = "".join(last_lines(log, 1) if log else [])
                print(f"  {time.monotonic() - start:.0f} s: {latest.strip()[:90]}", flush=True)
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reached the child too: let it stop its own children
        raise


def child_env(venv: Path) -> dict[str, str]:
    """Returns the environment for children: that of an activated venv, unbuffered, without telemetry."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(venv / "bin"), os.environ.get("PATH", os.defpath)]),
        "VIRTUAL_ENV": str(venv),
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def usable(venv: Path, python: str) -> bool:
    """Tells whether a venv is of this Python version and has a pip that works."""
    if not re.search(rf"(?m)^version\s*=\s*{re.escape(python)}\.", (venv / "pyvenv.cfg").read_text()):
        return False
    try:
        ask_pip = [str(venv / "bin/python"), "-m", "pip", "--version"]
        return subprocess.run(ask_pip, capture_output=True).returncode == 0
    except OSError:  # the Python it was made from is gone
        return False


def make_venv(venv: Path, python: str) -> int:
    """Makes an empty venv unless a usable one is there; moves an unusable one aside, never deletes it."""
    occupied = venv.is_dir() and any(venv.iterdir())
    if occupied and not (venv / "pyvenv.cfg").is_file():
        raise Refused(f"{venv} is no virtual environment.\nRemedy: choose another folder with --venv PATH")
    if occupied and usable(venv, python):
        return 0
    refuse_missing_venv()
    refuse_full_disk(next(parent for parent in venv.parents if parent.is_dir()))
    if occupied:
        aside = venv.with_name(f"{venv.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        print(f"{venv} is broken or not of Python {python}: moved to {aside}, which you may delete")
        venv.rename(aside)
    return run([sys.executable, "-m", "venv", str(venv)], dict(os.environ))


def ensure_venv(venv: Path, offline: bool = False) -> int:
    """Brings the venv up to date with pyproject.toml and the pins; returns 0 or the failed command's code."""
    refuse_python(sys.version_info[:2])
    python = "{}.{}".format(*sys.version_info)  # patch releases share an environment
    pyproject, constraints = (ROOT / "pyproject.toml").read_bytes(), (ROOT / CONSTRAINTS).read_bytes()
    wanted, mark = stamp(pyproject, constraints, python, str(ROOT)), venv / "nc_dist.stamp"
    found = mark.read_text().strip() if mark.is_file() and (venv / "bin/python").exists() else ""
    if found == wanted:
        return 0
    if offline:
        if not found:
            raise Refused(f"{venv} was never completed.\nRemedy: run once without --offline")
        print(f"note: {venv} is older than pyproject.toml, {CONSTRAINTS} or this Python; used as it is")
        return 0

    print(f"Installing into {venv}: about 6.5 GB, 2-6 minutes, once", flush=True)
    mark.unlink(missing_ok=True)  # an install that is cut off must be run again
    install = [str(venv / "bin/python"), "-m", "pip", "install", "-c", CONSTRAINTS, "-e", f".[{EXTRAS}]"]
    code = make_venv(venv, python) or run(install, child_env(venv), venv / "install.log")
    if code == 0:
        mark.write_text(wanted + "\n")
    return code


def check(venv: Path) -> int:
    """Runs every check even if one fails; returns 1 if any did."""
    codes = [run([str(venv / "bin" / tool), *args], child_env(venv)) for tool, *args in CHECKS]
    print("\nSummary:")
    for command, code in zip(CHECKS, codes, strict=True):
        print(f"  {'FAILED' if code else 'ok    '}  {' '.join(command)}")
    return int(any(codes))


def dispatch(command: str, venv: Path, extra: Sequence[str]) -> int:
    """Runs one of the three commands in a venv that is ready."""
    python = str(venv / "bin/python")
    if command == "check":
        return check(venv)
    if command == "demo":
        print("The demo takes about 8 minutes on 2 cores the first time.")
        return run([python, "tools/demo.py", *extra], child_env(venv))
    print("The tests take about half an hour on 2 cores.")
    return run(
        [python, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-o", "console_output_style=count", *extra],
        child_env(venv),
    )


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: the child's, 2 for a refusal, 130 after Ctrl-C."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=("demo", "test", "check"))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="PATH")
    parser.add_argument("--offline", action="store_true")
    options, extra = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    if options.command == "check" and extra:
        parser.error("check takes no further arguments")
    venv = options.venv.expanduser().resolve()
    try:
        return ensure_venv(venv, options.offline) or dispatch(options.command, venv, extra)
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
