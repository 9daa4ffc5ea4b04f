"""Bad input gets one clear error and exit code 2 before anything starts; nothing is made, nothing is lost."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from processes import ROOT, SMALL, cli, files_of, read_json, said

from nc_dist.data import manifest
from nc_dist.data.manifest import Manifest
from nc_dist.launch.start import start

CONFIGS = ROOT / "configs"
Json = dict[str, Any]
Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *args: object, journey: str = "pretrain", on: Any = "here") -> str:
    """The one error of a command that ends with exit code 2."""
    file, *overrides = args
    code = start(journey, Path(str(file)), [str(text) for text in overrides], on, False, None, False)
    printed = capsys.readouterr()
    assert code == 2, printed.err
    assert printed.err.startswith("error: ") and printed.err.count("error: ") == 1 and "Traceback" not in printed.err
    return printed.err


@pytest.fixture
def shards(small_shards: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(small_shards, tmp_path / "data" / small_shards.name))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs/x"


def change_manifest(shards: Path, change: Callable[[Json], None]) -> None:
    tree = read_json(shards / "manifest.json")
    change(tree)
    (shards / "manifest.json").write_text(json.dumps(tree))


def save_with(shards: Path, change: Callable[[Manifest], Manifest]) -> Manifest:
    """The set's manifest, changed and written as if it were right."""
    changed = change(manifest.load(shards))
    manifest.save(changed, shards)
    return changed


def with_column(loaded: Manifest, name: str, at: int, value: int) -> Manifest:
    column = getattr(loaded.samples, name).copy()
    column[at] = value
    return replace(loaded, samples=replace(loaded.samples, **{name: column}))


def label_out_of_range(shards: Path) -> None:
    save_with(shards, lambda loaded: with_column(loaded, "labels", 93, 10))


def class_without_sample(shards: Path) -> None:
    save_with(shards, lambda loaded: replace(loaded, class_names=[*loaded.class_names, "eleventh"]))


def other_size(shards: Path) -> None:
    change_manifest(shards, lambda tree: tree["shards"][2].update(bytes=tree["shards"][2]["bytes"] + 512))


def missing_shard(shards: Path) -> None:
    (shards / "uneven-000000.tar").unlink()


@pytest.mark.parametrize(
    "change, words",
    [
        (label_out_of_range, ["manifest.json", "has label 10", "allowed are 0..9", "sample"]),
        (class_without_sample, ["data.train", "class 10 ('eleventh') has no sample"]),
        (other_size, ["manifest.json", "does not match its shards", "uneven-000002.tar", "the manifest says"]),
        (missing_shard, ["manifest.json", "uneven-000000.tar: missing"]),
    ],
    ids=["label out of range", "class without a sample", "size", "missing shard"],
)
def test_shards_that_do_not_fit_are_refused(
    shards: Path, out: Path, capsys: Capture, change: Callable[[Path], None], words: list[str]
) -> None:
    change(shards)
    before = files_of(shards)
    error = refused(capsys, SMALL, f"out={out}", f"data.train={shards}")
    assert [word for word in [*words, str(shards)] if word not in error] == [], error
    assert not out.parent.exists() and files_of(shards) == before


@pytest.mark.parametrize("damage", ["bytes", "encoding"])
def test_an_unreadable_image_is_named_by_shard_and_key(shards: Path, out: Path, capsys: Capture, damage: str) -> None:
    """Bytes that rot on the disk, or a file that was never an image."""

    loaded = manifest.load(shards)
    at, shard = sum(loaded.shard_sizes[:2]) + 5, loaded.shards[2]
    rubbish = b"\0" * int(loaded.samples.sizes[at])
    with (shards / shard.name).open("r+b") as file:
        file.seek(int(loaded.samples.offsets[at]))
        file.write(rubbish)
    if damage == "encoding":
        save_with(shards, lambda loaded: with_column(loaded, "crc32", at, zlib.crc32(rubbish)))
    error = refused(capsys, SMALL, f"out={out}", f"data.train={shards}")
    assert shard.name in error and repr(loaded.samples.key(at)) in error
    assert ("unreadable image" if damage == "encoding" else "crc32") in error
    assert not out.parent.exists()


def test_an_unreadable_image_of_a_folder_is_named(tmp_path: Path, out: Path, capsys: Capture) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images/dog/3.png").write_bytes(b"no image")
    small = ["batch.global=4", "batch.micro=2", "data.holdout_per_class=1"]
    error = refused(capsys, SMALL, f"out={out}", f"data.train={tmp_path / 'images'}", *small)
    assert str(tmp_path / "images/dog/3.png") in error and "unreadable image" in error
    assert not out.parent.exists()


def test_a_world_size_that_does_not_divide_the_micro_batches_is_refused(
    out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refused(capsys, SMALL, f"out={out}", "launch.workers=3", on="ray")
    assert "world size 3" in error and "4 micro-batches" in error and "[1, 2, 4]" in error and "launch.workers" in error
    monkeypatch.setenv("WORLD_SIZE", "8")  # torchrun
    assert "world size 8" in refused(capsys, SMALL, f"out={out}")
    assert not out.parent.exists()


def test_a_missing_run_file_and_a_missing_source_are_named(finished_run: Path, out: Path, capsys: Capture) -> None:
    assert "smal.yaml: no such file; did you mean" in refused(capsys, SMALL.with_name("smal.yaml"))
    measure, finetune = CONFIGS / "measure/digits.yaml", CONFIGS / "finetune/digits.yaml"
    error = refused(capsys, measure, "model=runs/none", f"out={out}", journey="measure")
    assert "model=runs/none: no such folder" in error and "a run or export folder" in error
    error = refused(capsys, finetune, "source=runs/none", "data.train=digits", f"out={out}", journey="finetune")
    assert "runs/none: no exported model" in error
    error = refused(capsys, measure, f"model={finished_run}", f"out={out}", "blocks=[layer9]", journey="measure")
    assert "layer9" in error and "layer1.0" in error
    assert not out.parent.exists()


def test_a_damaged_export_is_refused(finished_run: Path, tmp_path: Path, out: Path, capsys: Capture) -> None:
    copy = shutil.copytree(finished_run / "export", tmp_path / "copy/export")
    (copy / "model.safetensors").write_bytes(b"\0" * 100)
    settings = [f"source={tmp_path / 'copy'}", "data.train=digits", f"out={out}"]
    error = refused(capsys, CONFIGS / "finetune/digits.yaml", *settings, journey="finetune")
    assert "not a model that fits its config.json" in error and str(copy) in error
    assert not out.parent.exists()


def test_the_command_line_reports_all_errors_at_once_with_exit_code_2(out: Path) -> None:
    done = cli("pretrain", SMALL, f"out={out}", "optim.momentun=1", "optim.lr=fast", "loss.kind=supconn")
    assert done.returncode == 2 and done.stdout == "", said(done)
    assert "3 errors" in done.stderr and "Traceback" not in done.stderr
    for words in (
        "small.yaml",
        "optim.momentun",
        "did you mean 'momentum'",
        "optim.lr='fast'",
        "did you mean 'supcon'? Allowed: ce,",
    ):
        assert words in done.stderr, said(done)
    assert not out.parent.exists()


def test_another_configuration_s_folder_is_kept_and_fresh_moves_it_aside(finished_run: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished_run, tmp_path / "runs/x", symlinks=True))
    before = files_of(out)
    done = cli("pretrain", out / "run.yaml", f"out={out}", "optim.lr=0.3", "epochs=0.5", "--on", "here")
    assert done.returncode == 2, said(done)
    assert f"out={out}: belongs to another configuration" in done.stderr and "--fresh" in done.stderr
    assert "optim.lr: 0.2 -> 0.3" in done.stderr and "epochs: 4.0 -> 0.5" in done.stderr
    assert files_of(out) == before

    done = cli("pretrain", out / "run.yaml", f"out={out}", "optim.lr=0.3", "epochs=0.5", "--on", "here", "--fresh")
    assert done.returncode == 0, said(done)
    (aside,) = [path for path in out.parent.iterdir() if path != out]
    assert files_of(aside) == before and str(aside) in done.stdout
    assert read_json(out / "result.json")["steps"] < read_json(aside / "result.json")["steps"]
