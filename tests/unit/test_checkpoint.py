"""Checkpoints: complete or not there, the newest sound one is taken up, old ones go, the best one stays."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nc_dist import checkpoint
from nc_dist.checkpoint import retention
from nc_dist.checkpoint.manifest import read_manifest, saved_state
from nc_dist.checkpoint.retention import chosen_steps
from nc_dist.errors import InputError
from nc_dist.world import World


class FakeEngine:
    """Writes two files, one of them in a folder; `dies` ends the save half-way."""

    def __init__(self, dies: BaseException | None = None) -> None:
        self.dies = dies

    def save(self, folder: Path, client_state: dict[str, Any]) -> list[Path]:
        (folder / "weights").write_text(f"weights {client_state}")
        if self.dies is not None:
            raise self.dies
        (folder / "zero").mkdir()
        (folder / "zero/part").write_text("part" * 100)
        return [folder / "weights", folder / "zero/part"]


def save(folder: Path, step: int, best: int | None = None, dies: BaseException | None = None, **more: Any) -> Path:
    engine: Any = FakeEngine(dies)
    return checkpoint.save(folder, engine, step, {"step": step}, World(), best=best, **more)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_whole_and_the_links_point_to_it(tmp_path: Path) -> None:
    assert save(tmp_path, 5, best=5) == tmp_path / "step_5"
    assert checkpoint.verify(tmp_path / "step_5") == []
    assert steps(tmp_path) == ["best", "last", "step_5"]
    assert (tmp_path / "last").readlink() == Path("step_5")  # relative: the folder may be moved
    assert (tmp_path / "best/weights").read_text() == "weights {'step': 5}"
    assert checkpoint.latest(tmp_path) == tmp_path / "step_5"


def test_last_moves_on_and_best_stays_with_the_best(tmp_path: Path) -> None:
    save(tmp_path, 1, best=1)
    save(tmp_path, 2, best=1)
    assert ((tmp_path / "last").readlink().name, (tmp_path / "best").readlink().name) == ("step_2", "step_1")
    save(tmp_path, 3, best=3)
    assert ((tmp_path / "last").readlink().name, (tmp_path / "best").readlink().name) == ("step_3", "step_3")


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 11):
        save(tmp_path, step, best=2 if step > 1 else None)
    assert steps(tmp_path) == ["best", "last", "step_10", "step_11", "step_2"]
    save(tmp_path, 12, best=12)
    assert steps(tmp_path) == ["best", "last", "step_11", "step_12"]


def test_newest_is_by_number_not_by_name(tmp_path: Path) -> None:
    save(tmp_path, 9)
    save(tmp_path, 10)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_10"


def test_an_interrupted_save_is_never_picked_up_and_the_next_one_succeeds(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, dies=KeyboardInterrupt())
    assert (tmp_path / "step_2.partial").is_dir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step_1"
    save(tmp_path, 2)
    assert steps(tmp_path) == ["last", "step_1", "step_2"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_2"


def test_the_same_step_reached_again_replaces_itself(tmp_path: Path) -> None:
    save(tmp_path, 1, best=1)
    (tmp_path / "step_1/stray").write_text("of the first attempt")
    save(tmp_path, 1)
    assert not (tmp_path / "step_1/stray").exists() and checkpoint.verify(tmp_path / "step_1") == []


@pytest.mark.parametrize("damage", ["byte", "shorter", "missing", "no manifest", "torn manifest", "other manifest"])
def test_a_damaged_newest_is_passed_over_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    save(tmp_path, 1)
    part, manifest = save(tmp_path, 2) / "zero/part", tmp_path / "step_2" / checkpoint.MANIFEST
    match damage:
        case "byte":
            part.write_text("p" + part.read_text()[1:-1] + "x")
        case "shorter":
            part.write_text(part.read_text()[:-1])
        case "missing":
            part.unlink()
        case "no manifest":
            manifest.unlink()
        case "torn manifest":
            manifest.write_bytes(b"\xff" + manifest.read_bytes()[1:])
        case "other manifest":
            manifest.write_text("[]")
    assert checkpoint.latest(tmp_path) == tmp_path / "step_1"
    said = capsys.readouterr().out
    assert "step_2 is damaged and passed over" in said
    faults = {"byte": "zero/part: other bytes than were written", "missing": "zero/part: missing"}
    faults["shorter"] = "zero/part: 399 bytes, 400 were written"
    assert faults.get(damage, "no readable manifest") in said


def test_there_is_none_in_an_empty_or_missing_folder(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "none") is None


def test_the_step_is_in_the_name() -> None:
    assert checkpoint.step_of(Path("a/step_120")) == 120 and checkpoint.step_of(None) == 0
    assert checkpoint.step_of(Path("a/step_120.partial/..") / "step_7") == 7


def test_a_disk_that_is_full_leaves_nothing_behind_and_names_what_is_whole_and_what_to_do(tmp_path: Path) -> None:
    save(tmp_path, 1)
    full = OSError(28, "No space left on device")
    with pytest.raises(checkpoint.SaveFailed, match=r"step 2: .*rank 0: OSError: .*No space left on device") as caught:
        save(tmp_path, 2, dies=full)
    said = str(caught.value)
    assert f"{tmp_path}/step_1 is whole" in said and "make room" in said and "same command" in said
    assert steps(tmp_path) == ["last", "step_1"]


def test_the_first_save_that_fails_says_that_there_is_none_before_it(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.SaveFailed, match="there is no earlier checkpoint"):
        save(tmp_path, 2, dies=OSError(28, "No space left on device"))
    assert steps(tmp_path) == []


def test_what_is_written_beside_belongs_to_it_and_its_faults_are_the_saves(tmp_path: Path) -> None:
    path = save(tmp_path, 1, beside=lambda folder: (folder / "export").write_text("weights"))
    assert set(read_manifest(path)["files"]) == {"export", "weights", "zero/part"}
    with pytest.raises(checkpoint.SaveFailed, match="ZeroDivisionError"):
        save(tmp_path, 2, beside=lambda folder: 1 / 0)
    assert steps(tmp_path) == ["last", "step_1"]


def test_the_state_can_be_read_without_any_engine(tmp_path: Path) -> None:
    assert saved_state(save(tmp_path, 3)) == {"step": 3}


def test_what_earlier_attempts_left_half_written_or_half_removed_goes_with_the_next_save(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    for left in ("step_1.partial", "step_3.partial"):
        (tmp_path / left / "zero").mkdir(parents=True)
        (tmp_path / left / "zero/part").write_text("part")
    save(tmp_path, 4)
    assert steps(tmp_path) == ["last", "step_2", "step_4"]


def test_what_was_passed_over_does_not_push_out_what_is_sound(tmp_path: Path) -> None:
    """Gone on from step 10, below the damaged 20 and 30; the best one was among these."""
    for step in (10, 20, 30):
        save(tmp_path, step, best=min(step, 20), retention=checkpoint.Retention(3))
    for step in (20, 30):
        (tmp_path / f"step_{step}/weights").unlink()
    save(tmp_path, 15, best=10)
    assert steps(tmp_path) == ["best", "last", "step_10", "step_15"]
    assert (tmp_path / "best").readlink().name == "step_10"


@pytest.mark.parametrize("gone", [None, 7])
def test_a_link_to_a_best_that_is_not_there_goes(tmp_path: Path, gone: int | None) -> None:
    save(tmp_path, 8, best=8)
    save(tmp_path, 9, best=gone)
    assert steps(tmp_path) == ["last", "step_8", "step_9"]


def test_a_folder_that_cannot_be_removed_ends_no_save_and_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a file that is open stays under another name."""

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))

    save(tmp_path, 1)
    (tmp_path / "step_1/stray").write_text("of the first attempt")
    (tmp_path / "step_2.partial").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(retention.shutil, "rmtree", busy)
        for step in (1, 2, 3):
            save(tmp_path, step)
    assert [name for name in steps(tmp_path) if not name.endswith(".partial")] == ["last", "step_2", "step_3"]
    assert len([name for name in steps(tmp_path) if name.endswith(".partial")]) == 3
    save(tmp_path, 4)
    assert steps(tmp_path) == ["last", "step_3", "step_4"]


def test_one_that_is_being_copied_is_pruned_later(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    save(tmp_path, 3, in_use={1})
    assert steps(tmp_path) == ["last", "step_1", "step_2", "step_3"]
    save(tmp_path, 4)
    assert steps(tmp_path) == ["last", "step_3", "step_4"]


def test_a_folder_without_a_sound_one_is_not_begun_anew_silently(tmp_path: Path) -> None:
    assert checkpoint.own_newest(tmp_path) is None
    for step in (1, 2):
        save(tmp_path, step)
        (tmp_path / f"step_{step}/weights").unlink()
    with pytest.raises(InputError, match=r"none of the 2 checkpoints is whole.* --fresh"):
        checkpoint.own_newest(tmp_path)


STEPS = st.sets(st.integers(1, 50), max_size=12)


@given(
    there=STEPS,
    keep=st.none() | st.integers(1, 4),
    chosen=st.frozensets(st.integers(1, 50), max_size=3),
    best=st.none() | st.integers(1, 50),
    last=st.integers(1, 50),
)
def test_retention_keeps_the_newest_the_chosen_and_the_best_and_no_other(
    there: set[int], keep: int | None, chosen: frozenset[int], best: int | None, last: int
) -> None:
    staying = checkpoint.Retention(keep, chosen).staying(there, last, best)
    past = {step for step in there if step <= last}
    newest = set(sorted(past)[-keep:]) if keep else past
    assert staying == newest | (past & (chosen | {best}))


def test_chosen_epochs_are_whole_steps_the_first_at_least() -> None:
    assert chosen_steps((0.001, 0.5, 1, 2.5), 10) == {1, 5, 10, 25}
