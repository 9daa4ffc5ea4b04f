"""The scripts of cluster/: clean by shellcheck, and clear about what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed (Debian: shellcheck)")
@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_submit_names_what_is_missing() -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run([CLUSTER / "submit.sh", "pretrain"], capture_output=True, text=True, env=env)
    assert done.returncode != 0 and "RAY_API_SERVER_ADDRESS" in done.stderr
    env["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:8265"
    done = subprocess.run([CLUSTER / "submit.sh", "pretrain"], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "cluster/submit.sh pretrain" in done.stdout
