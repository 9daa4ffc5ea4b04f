"""SIGKILL in each phase of a save, and files that lie: the same command goes on and ends bitwise the same (6c)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, SMALL, curve, read_json, run_command, said, torchrun
from safetensors.numpy import load_file

from nc_dist.checkpoint.manifest import checkpoints_in, step_of, verify

pytestmark = pytest.mark.slow

ENGINES = {"torch": ["engine.kind=torch"], "zero 2": ["engine.kind=deepspeed", "engine.zero=2", "engine.clip=1.2"]}
# Where which rank dies: the phase, the rank, the step of the folder that it works on; then what is whole.
KILLS = {
    "torch": [
        ("a rank writes", 0, 10, []),
        ("files written", 0, 20, [10]),
        ("manifest written", 0, 30, [10, 20]),
        ("renamed", 0, 30, [10, 20, 30]),
        ("pruning", 0, 20, [30, 40]),
    ],
    "zero 2": [
        ("a rank writes", 1, 20, [10]),
        ("files written", 1, 30, [10, 20]),
    ],
}
SETTINGS = ["keep=2", "save_every=10", "measure_every=50"]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to, with all its checkpoints."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = torchrun(2, "pretrain", SMALL, f"out={out}", *SETTINGS, "keep=null", *ENGINES[engine])
    assert done.returncode == 0, said(done)
    return out


def killed(phase: str, rank: int, step: int, *args: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    script = [str(ROOT / "tests/dist/killed_at.py"), phase, str(rank), str(step)]
    return run_command([*launcher, "--nproc-per-node=2", *script, *map(str, args)], 120)


def whole_steps(out: Path) -> list[int]:
    """The steps of what has a checkpoint's name, all of which must be whole."""
    found = checkpoints_in(out)
    assert [(place.name, faults) for place in found if (faults := verify(place))] == []
    return [step_of(place) for place in found]


def assert_bitwise(out: Path, expected: Path) -> None:
    for key in ("train/loss", "train/grad_norm"):
        assert curve(out, key) == curve(expected, key), key
    ours, theirs = (load_file(folder / "export/model.safetensors") for folder in (out, expected))
    assert [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()] == []


def test_killed_in_every_phase_of_a_save_the_same_command_ends_bitwise_the_same(
    engine: str, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["pretrain", SMALL, f"out={out}", *SETTINGS, *ENGINES[engine]]
    for phase, rank, step, left in KILLS[engine]:
        done = killed(phase, rank, step, *command)
        assert done.returncode != 0 and "Signal 9" in said(done), f"{phase}: {said(done)}"
        assert whole_steps(out) == left, phase
        if phase != "renamed":
            assert list((out / "checkpoints").glob(f"step_{step}*.partial")), phase
    done = torchrun(2, *command)
    assert done.returncode == 0, said(done)
    assert "damaged" not in done.stdout + done.stderr  # what is half written or half removed has not that name
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"last", "best", "step_40", "step_50"}
    assert (out / "checkpoints/last").readlink().name == "step_50"
    assert_bitwise(out, whole)


@pytest.mark.parametrize("engine", ["zero 2"], indirect=True)
def test_truncated_and_bit_flipped_files_are_found_and_the_previous_checkpoint_ends_bitwise_the_same(
    engine: str, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    (out / "result.json").unlink()
    newest, previous = (max((out / f"checkpoints/step_{n}").glob("*.pt"), key=lambda p: p.name) for n in (50, 40))
    size = newest.stat().st_size
    os.truncate(newest, size - 100)
    data = bytearray(previous.read_bytes())
    data[len(data) // 2] ^= 1
    previous.write_bytes(data)

    done = torchrun(2, "pretrain", SMALL, f"out={out}", *SETTINGS, "keep=null", *ENGINES[engine])
    assert done.returncode == 0, said(done)
    assert f"step_50 is damaged and passed over: {newest.name}: {size - 100} bytes, {size} were" in done.stdout
    assert f"step_40 is damaged and passed over: {previous.name}: other bytes" in done.stdout
    assert f"goes on from {out}/checkpoints/step_30\n" in done.stdout
    assert read_json(out / "result.json")["steps"] == 50
    assert_bitwise(out, whole)
