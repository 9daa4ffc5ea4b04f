"""A rank that cannot write: every rank learns of it, nothing half-written stays, what is whole before it is named."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
from processes import run_ranks

from nc_dist import checkpoint
from nc_dist.checkpoint.manifest import read_manifest
from nc_dist.engine import DeepSpeedSpec, TorchSpec
from nc_dist.make_engine import make_engine
from nc_dist.model import Model, ModelSpec
from nc_dist.optim import SGD
from nc_dist.spec import validate
from nc_dist.world import World

pytestmark = pytest.mark.slow

SPECS: dict[str, TorchSpec | DeepSpeedSpec] = {"torch": TorchSpec(), "zero 2": DeepSpeedSpec(zero=2)}


def engine_of(name: str, world: World) -> Any:
    backbone = {"kind": "small_resnet", "name": "resnet8", "width": 4}
    model = Model(validate(ModelSpec, {"backbone": backbone, "head": {"kind": "none"}}, "test"), 10)
    return make_engine(model, SPECS[name], SGD(), (4 * world.size, 4), world)


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
