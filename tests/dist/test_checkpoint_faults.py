"""A rank that cannot write: every rank learns of it, nothing half-written stays, what is whole before it is named."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import SMALL, run_ranks

from nc_dist import checkpoint
from nc_dist.checkpoint.manifest import read_manifest
from nc_dist.checkpoint.shared_faults import Faults
from nc_dist.config import PretrainRun
from nc_dist.engine import DeepSpeedSpec, TorchSpec
from nc_dist.engine.make import make_engine
from nc_dist.errors import InputError
from nc_dist.model import Model, ModelSpec
from nc_dist.optim import SGD
from nc_dist.source_model import export_all
from nc_dist.source_set import open_source_set
from nc_dist.spec import validate
from nc_dist.world import World

pytestmark = pytest.mark.slow

SPECS: dict[str, TorchSpec | DeepSpeedSpec] = {"torch": TorchSpec(), "zero 2": DeepSpeedSpec(zero=2)}


def engine_of(name: str, world: World, ema: float | None = None) -> Any:
    backbone = {"kind": "small_resnet", "name": "resnet8", "width": 4}
    model = Model(validate(ModelSpec, {"backbone": backbone, "head": {"kind": "none"}}, "test"), 10)
    return make_engine(model, SPECS[name], SGD(), (4 * world.size, 4), world, ema)


def one_rank_cannot_write(world: World, folder: Path, name: str, bad: int) -> str:
    engine = engine_of(name, world)
    checkpoint.save(folder, engine, 1, {"step": 1}, world)
    if world.rank == bad:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        checkpoint.save(folder, engine, 2, {"step": 2}, world)
    except checkpoint.SaveFailed as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoint.save(folder, engine, 3, {"step": 3}, world)  # nobody is out of step
    return said


@pytest.mark.parametrize(("name", "bad"), [("torch", 0), ("zero 2", 1)])
def test_all_ranks_learn_that_one_cannot_write_and_the_next_save_succeeds(name: str, bad: int, tmp_path: Path) -> None:
    said = run_ranks(one_rank_cannot_write, 2, tmp_path, name, bad)
    assert said[0] == said[1] and said[0].startswith("step 2: the checkpoint could not be written (rank ")
    assert f"rank {bad}: " in said[0] and f"rank {1 - bad}: " not in said[0]
    assert f"{tmp_path}/step_1 is whole" in said[0] and "make room" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step_1", "step_3"]
    assert checkpoint.verify(tmp_path / "step_1") == checkpoint.verify(tmp_path / "step_3") == []
    manifest = read_manifest(tmp_path / "step_3")
    written = {path.name for path in (tmp_path / "step_3").iterdir()} - {checkpoint.MANIFEST}
    assert set(manifest["files"]) == written and manifest["world_size"] == 2
    assert len(written) == {"torch": 1, "zero 2": 3}[name], "of every rank its own"


def rank_0_cannot_export(world: World, folder: Path) -> str:
    tree = yaml.safe_load(SMALL.read_text()) | {"out": str(folder), "ema": 0.9}
    run = validate(PretrainRun, tree, "small.yaml")
    data, engine = open_source_set(run), engine_of("zero 2", world, run.ema)
    if world.rank == 0:
        (folder / "in_the_way").write_text("no folder")

    def export(partial: Path) -> None:
        export_all(folder / "in_the_way", run, data, engine, world)

    with pytest.raises(checkpoint.SaveFailed) as caught:
        checkpoint.save(folder / "checkpoints", engine, 1, {"step": 1}, world, beside=export)
    with pytest.raises(Faults, match="rank 0: NotADirectoryError"):  # as at the end of a run
        export(folder)
    if world.rank == 0:
        (folder / "in_the_way").unlink()
    world.barrier()
    checkpoint.save(folder / "checkpoints", engine, 2, {"step": 2}, world, beside=export)  # nobody is out of step
    return str(caught.value)


def test_an_export_that_fails_on_rank_0_ends_the_save_on_all_though_averaged_weights_are_gathered(
    tmp_path: Path,
) -> None:
    said = run_ranks(rank_0_cannot_export, 2, tmp_path)
    assert said[0] == said[1] and "could not be written (rank 0: NotADirectoryError: " in said[0]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last", "step_2"]
    assert (tmp_path / "in_the_way/export_ema/model.safetensors").is_file()


def rank_0_fails(world: World) -> list[str]:
    def said(error: Exception) -> str:
        def fail() -> None:
            raise error

        try:
            checkpoint.on_first(world, fail)
        except Exception as caught:
            return repr(caught)
        return ""

    return [said(error) for error in (InputError("resume=x: no"), OSError(5, "the store is gone"))]


def test_any_error_of_rank_0_reaches_all_who_wait_for_it() -> None:
    first, second = run_ranks(rank_0_fails, 2)
    assert first == ["InputError('resume=x: no')", "OSError(5, 'the store is gone')"]
    assert second == ["InputError('resume=x: no')", "Faults('rank 0: OSError: [Errno 5] the store is gone')"]


def each_rank_has_a_folder_of_its_own(world: World, folder: Path) -> str:
    """As on machines without shared storage: what rank 1 writes, rank 0 does not see."""

    class Engine:
        def save(self, folder: Path, client_state: dict[str, Any]) -> list[Path]:
            (folder / f"of_{world.rank}").write_text("x" * 10)
            return [folder / f"of_{world.rank}"]

    own, engine = folder / str(world.rank), Engine()
    (own / "step_1.partial").mkdir(parents=True)
    try:
        checkpoint.save(own, engine, 1, {"step": 1}, world)  # type: ignore[arg-type]
    except checkpoint.SaveFailed as error:
        return str(error)
    return ""


def test_ranks_that_share_no_storage_are_told_so(tmp_path: Path) -> None:
    said = run_ranks(each_rank_has_a_folder_of_its_own, 2, tmp_path)
    assert said[0] == said[1] and "of_1: another rank wrote it" in said[0] and "shared storage?" in said[0]
    assert [path.name for path in (tmp_path / "0").iterdir()] == []
