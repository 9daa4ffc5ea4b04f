"""Where a run begins: its own newest, what it uploaded, what `resume` names; and checkpoints that do not fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nc_dist import checkpoint
from nc_dist.checkpoint import Uploads, resume_from, upload
from nc_dist.checkpoint.checks import check_checkpoints, check_disk, free_bytes
from nc_dist.checkpoint.resume import check_given, retention_of, state_of
from nc_dist.config import PretrainRun
from nc_dist.errors import InputError
from nc_dist.run_folder import FRESH, check_same, prepare
from nc_dist.source_set import SourceSet, open_source_set
from nc_dist.spec import override, validate
from nc_dist.world import World


class Engine:
    """Writes one small file."""

    def save(self, folder: Path, client_state: dict[str, Any]) -> list[Path]:
        (folder / "weights").write_text("weights")
        return [folder / "weights"]


Made = tuple[PretrainRun, SourceSet]


def made(tree: dict[str, Any], out: Path, *overrides: str) -> Made:
    tree = {**tree, "out": str(out), "engine": {"kind": "deepspeed"}}
    run = validate(PretrainRun, override(tree, overrides), "run.yaml")
    return run, open_source_set(run)


def save(of: Made, step: int, **more: Any) -> Path:
    run, data = of
    engine: Any = Engine()
    state = {"step": step, **state_of(run, data, step)}
    return checkpoint.save(Path(run.out) / "checkpoints", engine, step, state, World(), **more)


@pytest.fixture
def old(tree: dict[str, Any], tmp_path: Path) -> Made:
    """A run with checkpoints of the steps 3 and 5."""
    of = made(tree, tmp_path / "old")
    for step in (3, 5):
        save(of, step)
    return of


def test_a_new_run_begins_from_scratch(tree: dict[str, Any], tmp_path: Path) -> None:
    of = made(tree, tmp_path / "new")
    assert resume_from(*of) is None and check_given(*of) is None


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/step_3", "checkpoints/last", "file://"])
def test_resume_takes_a_run_its_checkpoints_one_of_them_a_link_or_a_url(
    tree: dict[str, Any], tmp_path: Path, old: Made, name: str
) -> None:
    place = f"file://{old[0].out}" if name == "file://" else f"{old[0].out}/{name}"
    of = made(tree, tmp_path / "new", f"resume={place}")
    step = 3 if "step_3" in name else 5
    found = resume_from(*of)
    assert found is not None and checkpoint.step_of(found) == step and checkpoint.verify(found) == []
    assert (found.parent == tmp_path / "new/resumed_from") == (name == "file://")
    assert f"step {step}, " in str(check_given(*of))


def test_the_runs_own_checkpoint_goes_before_that_of_another(tree: dict[str, Any], tmp_path: Path, old: Made) -> None:
    of = made(tree, tmp_path / "new", f"resume={old[0].out}")
    own = save(of, 2)
    assert resume_from(*of) == own and f"step 2, {own}" == check_given(*of)


def test_a_damaged_newest_of_another_run_is_passed_over(tree: dict[str, Any], tmp_path: Path, old: Made) -> None:
    of = made(tree, tmp_path / "new", f"resume={old[0].out}")
    (Path(old[0].out) / "checkpoints/step_5/weights").write_text("?")
    assert checkpoint.step_of(resume_from(*of)) == 3
    (Path(old[0].out) / "checkpoints/step_3/weights").write_text("?")
    with pytest.raises(InputError, match="resume=.*none of its checkpoints is whole"):
        resume_from(*of)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.backbone.width=8"], ["of another model, of identity", "model.backbone.width: 4 -> 8"]),
        (["loss.kind=supcon", "model.head.kind=mlp"], ["another model", "num_classes: 10 -> 0", "model.head.kind"]),
        (["data.train=digits:test"], ["data of identity", "saved with"]),
        (["batch.micro=32"], ["batch.micro=32, saved with 64"]),
        (["batch.global=64"], ["batch.global=64, saved with 128"]),
        (["seed=7"], ["seed=7, saved with 0"]),
        (["engine.zero=1"], ["engine.zero: 2 -> 1", "checkpoint export", "model.backbone.weights=FOLDER/backbone"]),
        (["engine.kind=torch"], ["engine.kind: 'deepspeed' -> 'torch'", "checkpoint export"]),
        (["engine.precision=bf16"], ["engine.precision: 'fp32' -> 'bf16'"]),
        (["optim.momentum=0.9"], ["optim.momentum: 0.5 -> 0.9"]),
        (["epochs=0.4"], ["at step 5, and this run ends at step", "give more epochs"]),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_and_both_sides_are_named(
    tree: dict[str, Any], tmp_path: Path, old: Made, overrides: list[str], said: list[str]
) -> None:
    of = made(tree, tmp_path / "new", f"resume={old[0].out}", *overrides)
    for refuse in (resume_from, check_given):
        with pytest.raises(InputError, match="resume=.*step_5: ") as caught:
            refuse(*of)
        assert [words for words in said if words not in str(caught.value)] == []


def test_both_identities_of_models_are_shown(tree: dict[str, Any], tmp_path: Path, old: Made) -> None:
    of = made(tree, tmp_path / "new", f"resume={old[0].out}", "model.backbone.width=8")
    ours, theirs = (state_of(*each, 1)["about"]["model"]["identity"] for each in (of, old))
    with pytest.raises(InputError, match=f"identity {theirs}; this run's is {ours}"):
        resume_from(*of)


def test_rate_and_length_and_what_is_seen_may_change(tree: dict[str, Any], tmp_path: Path, old: Made) -> None:
    changed = ["optim.lr=0.5", "epochs=2", "data.augment.kind=none", "log_every=1", "engine.clip=2", "ema=0.9"]
    assert checkpoint.step_of(resume_from(*made(tree, tmp_path / "new", f"resume={old[0].out}", *changed))) == 5


@pytest.mark.parametrize("place", ["nowhere", "s3x://bucket/run"])
def test_a_place_without_checkpoints_is_refused(tree: dict[str, Any], tmp_path: Path, place: str) -> None:
    with pytest.raises(InputError, match=place.partition(":")[0]):
        check_given(*made(tree, tmp_path / "new", f"resume={place}"))


def test_an_empty_folder_goes_on_from_what_was_uploaded_and_only_from_its_own(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    url = f"upload=file://{tmp_path}/there"
    of = made(tree, tmp_path / "lost", url)
    for step in (3, 5):
        save(of, step)
    Uploads(of[0].upload, Path(of[0].out) / "checkpoints", retention_of(*of), World()).close()

    again = made(tree, tmp_path / "again", url)
    assert "step 5, file://" in str(check_given(*again))
    assert resume_from(*again) == tmp_path / "again/checkpoints/step_5"
    for refuse in (resume_from, check_given):
        with pytest.raises(InputError, match="upload=.*holds step_5 of a run of other settings; give another URL"):
            refuse(*made(tree, tmp_path / "other", url, "optim.lr=0.5"))
    anew = made(tree, tmp_path / "anew", url)
    prepare(anew[0], fresh=True)
    with pytest.raises(InputError, match="holds step_5 of before --fresh"):
        resume_from(*anew)
    assert (tmp_path / "anew" / FRESH).is_file() and not (tmp_path / "anew/checkpoints").exists()


def test_what_was_uploaded_goes_before_older_or_damaged_checkpoints_here(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a run goes on at a node whose disk has an older state of it."""
    url = f"upload=file://{tmp_path}/there"
    of = made(tree, tmp_path / "lost", url)
    for step in (3, 5):
        save(of, step)
    Uploads(of[0].upload, Path(of[0].out) / "checkpoints", retention_of(*of), World()).close()

    for name, steps, damaged, expected in (
        ("older", (2,), (), 5),
        ("newer", (6,), (), 6),
        ("the same", (5,), (), 5),
        ("damaged beyond", (2, 7), (7,), 5),
        ("damaged", (7,), (7,), 5),
    ):
        again = made(tree, tmp_path / name, url)
        for step in steps:
            save(again, step)
        for step in damaged:
            (tmp_path / name / f"checkpoints/step_{step}/weights").write_text("?")
        begins = str(check_given(*again))
        assert resume_from(*again) == tmp_path / f"{name}/checkpoints/step_{expected}", name
        assert damaged or begins.startswith(f"step {expected}, {'file' if name == 'older' else tmp_path}")

    for step in (3, 5):
        (tmp_path / f"there/step_{step}/weights").write_text("?")
    stale, broken = made(tree, tmp_path / "stale", url), made(tree, tmp_path / "broken", url)
    own = save(stale, 2)
    assert resume_from(*stale) == own
    assert "step_5 is damaged and passed over" in capsys.readouterr().out
    with pytest.raises(InputError, match="step_5 and all before it are damaged; give another upload URL"):
        resume_from(*broken)
    save(broken, 2)
    (tmp_path / "broken/checkpoints/step_2/weights").write_text("?")
    with pytest.raises(InputError, match=r"none of the 1 checkpoints is whole.* --fresh"):
        resume_from(*broken)


def test_a_store_that_cannot_be_read_ends_no_run_that_has_a_checkpoint_here(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = made(tree, tmp_path / "new", f"upload=file://{tmp_path}/{'x' * 300}")
    own = save(of, 2)
    assert resume_from(*of) == own
    assert f"cannot be read ([Errno 36] File name too long: '{tmp_path}" in (said := capsys.readouterr().out)
    assert f"the run goes on from {own}" in said and said.count("\n") == 1


def test_a_store_that_cannot_be_read_or_copied_from_is_told_by_its_key_with_a_remedy(
    tree: dict[str, Any], tmp_path: Path, old: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "WAIT_S", 0.001)
    with pytest.raises(InputError, match=r"upload=.*: cannot be read \(.*too long.*; give the same command again"):
        resume_from(*made(tree, tmp_path / "new", f"upload=file://{tmp_path}/{'x' * 300}"))
    (tmp_path / "new").mkdir()
    (tmp_path / "new/resumed_from").write_text("in the way")
    with pytest.raises(InputError, match="resume=.*: step_5 cannot be brought here .*; give the same command again"):
        resume_from(*made(tree, tmp_path / "new", f"resume=file://{old[0].out}"))


def test_what_was_brought_by_an_attempt_that_saved_nothing_is_brought_again(
    tree: dict[str, Any], tmp_path: Path, old: Made
) -> None:
    of = made(tree, tmp_path / "new", f"resume=file://{old[0].out}")
    assert resume_from(*of) == resume_from(*of) == tmp_path / "new/resumed_from/step_5"
    assert checkpoint.verify(tmp_path / "new/resumed_from/step_5") == []


def test_less_disk_than_a_checkpoint_needs_is_refused_with_both_numbers(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out=x: 2 MB are free there, and one checkpoint needs about 3.5 GB"):
        check_disk("x", one=3_500_000_000, free=2_000_000)
    check_disk("x", one=5, free=5)
    assert free_bytes(tmp_path / "not/yet/there") > 10**6
    of = made(tree, tmp_path / "new")
    assert check_checkpoints(*of, one=2_000_000)["a checkpoint"].startswith("2 MB, about; ")
    with pytest.raises(InputError, match="one checkpoint needs about 1 EB"):
        check_checkpoints(*of, one=10**18)


@pytest.mark.parametrize("epochs", ["[0]", "[0.5, 1.5]", "[-1]"])
def test_epochs_to_keep_lie_in_the_run(tree: dict[str, Any], tmp_path: Path, epochs: str) -> None:
    with pytest.raises(InputError, match="keep_epochs="):
        check_checkpoints(*made(tree, tmp_path / "new", f"keep_epochs={epochs}"), one=1)


def test_another_stage_or_micro_batch_in_the_same_folder_is_told_how_to_go_on_from_the_weights(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    prepare(made(tree, tmp_path / "x")[0])
    for changed in ("engine.zero=1", "engine.kind=torch", "batch.micro=32"):
        with pytest.raises(InputError, match=r"nc-dist checkpoint export .*/x --to FOLDER"):
            check_same(made(tree, tmp_path / "x", changed)[0], tmp_path / "x")
    with pytest.raises(InputError, match="belongs to another configuration") as caught:
        check_same(made(tree, tmp_path / "x", "optim.lr=0.5")[0], tmp_path / "x")
    assert "checkpoint export" not in str(caught.value)
