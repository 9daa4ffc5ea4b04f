"""Checkpoints as a user meets them: verify, export, go on from another run, a lost folder, a disk that is full."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import SMALL, cli, curve, files_of, read_json, said, torchrun
from safetensors.numpy import load_file


def step_folders(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run, to be damaged at will."""
    return Path(shutil.copytree(finished_run, tmp_path / "copied", symlinks=True))


def test_verify_says_what_is_whole_what_is_not_and_what_a_run_would_go_on_from(copied: Path) -> None:
    done = cli("checkpoint", "verify", copied)
    newest = (copied / "checkpoints/last").resolve()
    assert done.returncode == 0 and f"{newest.name}: 1 processes, " in done.stdout and ": whole" in done.stdout
    assert done.stdout.splitlines()[-1] == f"a run goes on from {newest}"

    weights = newest / "export/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.truncate(newest / "torch.pt", 100)
    done = cli("checkpoint", "verify", copied / "checkpoints")
    assert done.returncode == 1 and f"{newest.name}: 1 processes" in done.stdout, said(done)
    assert "DAMAGED, 2 faults" in done.stdout and "export/model.safetensors: other bytes" in done.stdout
    assert "torch.pt: 100 bytes, " in done.stdout
    assert done.stdout.splitlines()[-1].startswith("a run goes on from ") and newest.name not in done.stdout[-30:]
    done = cli("checkpoint", "verify", newest)
    assert done.returncode == 1 and "nothing whole to go on from; --fresh" in done.stdout


def test_export_copies_the_weights_of_the_last_the_best_or_any_step(
    copied: Path, tmp_path: Path, finished_run: Path
) -> None:
    result = read_json(finished_run / "result.json")
    best = f"step_{result['best_step']}"
    assert (copied / "checkpoints/best").readlink().name == best and result["best_score"] > 0.1
    for which, folder in (("last", "last"), ("best", best), (best, best)):
        done = cli("checkpoint", "export", copied, "--which", which, "--to", tmp_path / which / "weights")
        assert done.returncode == 0, said(done)
        ours, theirs = tmp_path / which / "weights", (copied / "checkpoints" / folder).resolve() / "export"
        assert {p.name for p in ours.iterdir()} == {"backbone.safetensors", "model.safetensors", "config.json"}
        assert [p for p in ours.iterdir() if p.read_bytes() != (theirs / p.name).read_bytes()] == []
        shutil.rmtree(tmp_path / which)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--which", "step_1", "--to", "new"], "--which step_1: no such checkpoint"),
        (["--to", "."], "--to .: is there already; name a new folder"),
    ],
)
def test_export_says_what_is_wrong(finished_run: Path, args: list[str], message: str) -> None:
    before = files_of(finished_run)
    done = cli("checkpoint", "export", finished_run, *args)
    assert done.returncode == 2 and message in done.stderr, said(done)
    assert files_of(finished_run) == before
    done = cli("checkpoint", "verify", finished_run / "tb")
    assert done.returncode == 2 and "no checkpoint there" in done.stderr


def test_damaged_weights_are_not_exported_the_last_is_the_newest_whole_one(copied: Path, tmp_path: Path) -> None:
    newest = (copied / "checkpoints/last").resolve()
    os.truncate(newest / "export/model.safetensors", 100)
    done = cli("checkpoint", "export", copied, "--which", newest.name, "--to", tmp_path / "weights")
    assert done.returncode == 2 and "damaged: export/model.safetensors: 100 bytes" in done.stderr, said(done)
    assert "name another one with --which" in done.stderr and not (tmp_path / "weights").exists()
    done = cli("checkpoint", "export", copied, "--to", tmp_path / "weights")
    assert done.returncode == 0 and f"{newest} is damaged and passed over: export/model.s" in done.stdout, said(done)
    assert done.stdout.splitlines()[-1].startswith(f"{tmp_path}/weights: the weights of {newest.parent}/step_")


@pytest.mark.slow
def test_the_best_checkpoint_can_be_measured(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "measure.yaml").write_text(
        f"out: {tmp_path}/out\nmodel: {finished_run}/checkpoints/best\ndata: digits:test\nper_class: 10\n"
    )
    done = cli("measure", tmp_path / "measure.yaml")
    assert done.returncode == 0, said(done)
    result = read_json(tmp_path / "out/result.json")
    assert result["measured"][0]["step"] == read_json(finished_run / "result.json")["best_step"]


@pytest.mark.slow
def test_a_lost_folder_goes_on_from_what_was_uploaded_bitwise(tmp_path: Path, one_process: dict[str, Path]) -> None:
    url, lost, out = f"upload=file://{tmp_path}/there", tmp_path / "lost", tmp_path / "run"
    fp64 = ["engine.precision=fp64", "keep_epochs=[0.6]"]
    done = cli("pretrain", SMALL, f"out={lost}", url, *fp64)
    assert done.returncode == 0, said(done)
    result = read_json(lost / "result.json")
    assert result["upload"]["failed"] == {} and result["upload"]["uploaded"][-1] == 50
    assert step_folders(lost)[2:] == sorted(path.name for path in (tmp_path / "there").iterdir())
    assert "step_26" in step_folders(lost), "the end of 0.6 epochs"
    (tmp_path / "there/step_50/manifest.json").unlink()  # its upload never ended
    shutil.rmtree(lost)

    done = cli("pretrain", SMALL, f"out={out}", url, *fp64)
    assert done.returncode == 0, said(done)
    assert "ep 1 [41/43]" in done.stdout and "ep 1 [40/43]" not in done.stdout, "from step 40"
    whole = curve(one_process["ce"])
    assert curve(out) == {step: whole[step] for step in range(41, 51)}
    ours, theirs = (load_file(folder / "export/model.safetensors") for folder in (out, one_process["ce"]))
    assert [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()] == []
    done = cli("checkpoint", "verify", f"file://{tmp_path}/there")
    assert done.returncode == 0 and f"goes on from file://{tmp_path}/there/step_50" in done.stdout, said(done)


@pytest.mark.slow
def test_another_run_goes_on_where_one_ended_and_all_damaged_is_an_error(
    one_process: dict[str, Path], tmp_path: Path
) -> None:
    source, out = one_process["ce"], tmp_path / "on"
    command = ["pretrain", SMALL, f"out={out}", "engine.precision=fp64", f"resume={source}", "epochs=1.3"]
    done = cli(*command, "model.backbone.width=4")
    assert done.returncode == 2 and "a checkpoint of another model, of identity" in done.stderr, said(done)
    assert not out.exists()
    done = cli(*command)
    assert done.returncode == 0, said(done)
    assert list(curve(out)) == list(range(51, 57)) and read_json(out / "result.json")["steps"] == 56

    (out / "result.json").unlink()
    for path in (out / "checkpoints").glob("step_*"):
        os.truncate(path / "torch.pt", 10)
    done = cli(*command)
    assert done.returncode == 2 and "of the 1 checkpoints is whole" in done.stderr, said(done)
    assert "--fresh" in done.stderr and read_json(out / "status.json")["state"] == "bad_input"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run whose checkpoints, of 608 kB each, lie on a disk that is full within the third's export."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small disk")
    disk = tmp_path / "run/checkpoints"
    disk.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1550k", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield tmp_path / "run"
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_on_all_ranks_and_with_room_it_goes_on(small_disk: Path) -> None:
    command = ["pretrain", SMALL, f"out={small_disk}", "engine.kind=deepspeed", "engine.zero=2", "ema=0.9"]
    command.append("keep=null")
    done = torchrun(2, *command)
    assert done.returncode == 1, said(done)
    status = read_json(small_disk / "status.json")
    assert (status["state"], status["code"]) == ("failed", 1)
    whole = max(int(name[5:]) for name in step_folders(small_disk) if name.startswith("step_"))
    assert f"SaveFailed: step {whole + 10}: the checkpoint could not be written" in status["reason"]
    assert "(rank 0: SafetensorError: " in status["reason"], "in the export, before all gather the averaged weights"
    assert f"checkpoints/step_{whole} is whole" in status["reason"] and "make room" in status["reason"]
    assert [name for name in step_folders(small_disk) if name.endswith(".partial")] == []

    with (small_disk / "checkpoints/big").open("wb") as file:
        file.write(b"x" * (shutil.disk_usage(small_disk / "checkpoints").free - 100_000))
    done = cli(*command)
    assert done.returncode == 2 and "are free there, and one checkpoint needs about" in done.stderr, said(done)

    subprocess.run(["mount", "-o", "remount,size=10m", small_disk / "checkpoints"], check=True)
    done = torchrun(2, *command)
    assert done.returncode == 0, said(done)
    assert list(curve(small_disk)) == list(range(1, 51))
