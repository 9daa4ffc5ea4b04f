"""Checkpoints: complete or not there, the newest sound one is taken up, old ones go, the best one stays."""

from pathlib import Path
from typing import Any

import pytest

from nc_dist import checkpoint
from nc_dist.world import World


class FakeEngine:
    """Writes two files, one of them in a folder; `dies` ends the save half-way."""

    def __init__(self, dies: bool = False) -> None:
        self.dies = dies

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        (folder / "weights").write_text(f"weights {client_state}")
        if self.dies:
            raise KeyboardInterrupt
        (folder / "zero").mkdir()
        (folder / "zero/part").write_text("part" * 100)


def save(folder: Path, step: int, best: bool = False, dies: bool = False) -> Path:
    engine: Any = FakeEngine(dies)
    return checkpoint.save(folder, engine, step, {"step": step}, World(), best=best)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_whole_and_the_links_point_to_it(tmp_path: Path) -> None:
    assert save(tmp_path, 5, best=True) == tmp_path / "step_5"
    assert checkpoint.verify(tmp_path / "step_5") == []
    assert steps(tmp_path) == ["best", "last", "step_5"]
    assert (tmp_path / "last").readlink() == Path("step_5")  # relative: the folder may be moved
    assert (tmp_path / "best/weights").read_text() == "weights {'step': 5}"
    assert checkpoint.latest(tmp_path) == tmp_path / "step_5"


def test_last_moves_on_and_best_stays_with_the_best(tmp_path: Path) -> None:
    save(tmp_path, 1, best=True)
    save(tmp_path, 2)
    assert ((tmp_path / "last").readlink().name, (tmp_path / "best").readlink().name) == ("step_2", "step_1")
    save(tmp_path, 3, best=True)
    assert ((tmp_path / "last").readlink().name, (tmp_path / "best").readlink().name) == ("step_3", "step_3")


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 11):
        save(tmp_path, step, best=step == 2)
    assert steps(tmp_path) == ["best", "last", "step_10", "step_11", "step_2"]
    save(tmp_path, 12, best=True)
    assert steps(tmp_path) == ["best", "last", "step_11", "step_12"]


def test_newest_is_by_number_not_by_name(tmp_path: Path) -> None:
    save(tmp_path, 9)
    save(tmp_path, 10)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_10"


def test_an_interrupted_save_is_never_picked_up_and_the_next_one_succeeds(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, dies=True)
    assert (tmp_path / "step_2.partial").is_dir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step_1"
    save(tmp_path, 2)
    assert steps(tmp_path) == ["last", "step_1", "step_2"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_2"


def test_the_same_step_reached_again_replaces_itself(tmp_path: Path) -> None:
    save(tmp_path, 1, best=True)
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
    assert ("manifest" if "manifest" in damage else "zero/part: missing or changed") in said


def test_there_is_none_in_an_empty_or_missing_folder(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "none") is None


def test_the_step_is_in_the_name() -> None:
    assert checkpoint.step_of(Path("a/step_120")) == 120 and checkpoint.step_of(None) == 0
