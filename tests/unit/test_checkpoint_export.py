"""Which checkpoint's weights are exported, and that damage to other files does not matter. Here and behind a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nc_dist import checkpoint
from nc_dist.checkpoint.export import export
from nc_dist.errors import InputError
from nc_dist.world import World


class Engine:
    """Writes what is no export."""

    def save(self, folder: Path, client_state: dict[str, Any]) -> list[Path]:
        (folder / "optimiser").write_text("momentum")
        return [folder / "optimiser"]


def weights(folder: Path) -> None:
    for name in ("export", "export_ema"):
        (folder / name).mkdir()
        (folder / name / "model").write_text(f"{name} of {folder.stem}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 1 to 3, the second of them the best."""
    engine: Any = Engine()
    for step in (1, 2, 3):
        state = {"step": step, "best_step": min(step, 2)}
        folder, kept = tmp_path / "run/checkpoints", checkpoint.Retention(None)
        checkpoint.save(folder, engine, step, state, World(), best=min(step, 2), retention=kept, beside=weights)
    return tmp_path / "run"


@pytest.fixture(params=["", "file://"])
def path(request: pytest.FixtureRequest, run: Path) -> str:
    return f"{request.param}{run}"


@pytest.mark.parametrize(("which", "step"), [("last", 3), ("best", 2), ("step_1", 1)])
def test_the_weights_are_copied_and_the_averaged_ones_to_a_folder_in_it(
    path: str, tmp_path: Path, which: str, step: int
) -> None:
    assert export(path, which, tmp_path / "to").folder_name == f"step_{step}"
    files = {str(file.relative_to(tmp_path / "to")): file.read_text() for file in tmp_path.glob("to/**/model")}
    assert files == {"model": f"export of step_{step}", "export_ema/model": f"export_ema of step_{step}"}


def test_an_optimiser_that_is_damaged_does_not_keep_the_weights(path: str, run: Path, tmp_path: Path) -> None:
    (run / "checkpoints/step_3/optimiser").write_text("?")
    assert export(path, "last", tmp_path / "to").folder_name == "step_3"


def test_last_passes_over_damaged_weights_and_says_so(
    path: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints/step_3/export_ema/model").write_text("?")
    assert export(path, "last", tmp_path / "to").folder_name == "step_2"
    assert "step_3 is damaged and passed over: export_ema/model: 1 bytes" in capsys.readouterr().out
    with pytest.raises(InputError, match="step_3: damaged: export_ema/model: 1 bytes.*; name another one with --which"):
        export(path, "step_3", tmp_path / "new")
    for step in (1, 2):
        (run / f"checkpoints/step_{step}/export/model").unlink()
    with pytest.raises(InputError, match="step_1, step_2, step_3, are damaged; .* in its folder export/"):
        export(path, "last", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["gone", "unreadable"])
def test_best_is_known_without_the_newest_manifest(path: str, run: Path, tmp_path: Path, damage: str) -> None:
    manifest = run / "checkpoints/step_3" / checkpoint.MANIFEST
    manifest.unlink() if damage == "gone" else manifest.write_text("{")
    assert export(path, "best", tmp_path / "to").folder_name == "step_2"


def test_best_is_an_error_where_none_is_known(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints/best").unlink()
    for step in (1, 2, 3):
        (run / f"checkpoints/step_{step}" / checkpoint.MANIFEST).unlink()
    with pytest.raises(InputError, match="--which best: it is not known which was best.* holds step_1, step_2, step_3"):
        export(str(run), "best", tmp_path / "to")
