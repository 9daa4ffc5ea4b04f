"""What the controller repeats, how often, and as what an end reaches the driver: without a cluster.

In processes of their own, as Ray's way of authentication is settled where it is imported.
"""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import SMALL, run_ranks

from nc_dist.checkpoint import SaveFailed
from nc_dist.config import PretrainRun
from nc_dist.errors import Diverged, InputError
from nc_dist.launch import lease
from nc_dist.spec import load
from nc_dist.world import World

pytestmark = pytest.mark.slow


def given_up(out: Path, retries: int, *steps: int) -> tuple[int, Any]:
    """After how many failures the controller gives up, and by what; before each of them a checkpoint of such a step."""
    from nc_dist.launch import ray_train

    counted, gone = ray_train._Failures(out, retries), OSError("gone")
    gone.add_note("where it was")
    for number, step in enumerate(steps, 1):
        (out / f"checkpoints/step_{step}").mkdir(parents=True, exist_ok=True)
        (out / f"checkpoints/step_{step}/manifest.json").touch()
        try:
            counted.after_exception(None, {1: gone, 0: RuntimeError("connection closed")})
        except ray_train.Final as error:
            return number, error.args
    return len(steps), None


def checks_of_counting(world: World, out: Path) -> None:
    assert given_up(out / "a", 1, 10, 20, 30, 40) == (4, None)
    why = ("RuntimeError", "worker 1 failed: OSError: gone\nwhere it was")
    assert given_up(out / "b", 2, 10, 20, 20, 20, 30) == (4, why)


def test_failures_are_counted_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    run_ranks(checks_of_counting, 1, tmp_path)
    notices = (tmp_path / "b/notices.txt").read_text().splitlines()
    assert "failure 2 since the checkpoint of step 20, 2 are retried: the group starts again from there" in notices[2]
    assert notices[3].endswith("no more retries")


def checks_of_ends(world: World, out: Path) -> None:
    from nc_dist.launch import ray_train

    for end in (lease.Held("x"), InputError("x"), Diverged("x"), SaveFailed("x"), RuntimeError("x")):
        kind = next(name for name, cls in ray_train.FINAL.items() if isinstance(end, cls))
        error: Any = SimpleNamespace(controller_failure=ray_train.Final(kind, "why"))
        found = ray_train._reason(error, out)
        assert type(found) is type(end) and str(found) == "why"
    (out / "hangs").mkdir()
    (out / "hangs/verdict.txt").write_text("hang: rank 1")
    assert str(ray_train._reason(error, out)) == "hang: rank 1"
    final: Any = SimpleNamespace(controller_failure=ray_train.Final("SaveFailed", "the disk is full"))
    assert str(ray_train._reason(final, out)) == "the disk is full"

    tree = load(PretrainRun, SMALL, [f"out={out / 'elsewhere'}"]).model_dump(mode="json", by_alias=True)
    config = {"name": "pretrain", "tree": tree, "cwd": "/nowhere", "sizes": [1], "owner": "a", "user_code": False}
    with pytest.raises(ray_train.Final, match=r"InputError.*elsewhere: not on this node, .* storage that all nodes"):
        ray_train._work(config)
    assert not (out / "elsewhere").exists()


def test_ends_that_are_final_keep_their_kind_a_hang_its_line_and_a_folder_that_a_node_does_not_see_is_one(
    tmp_path: Path,
) -> None:
    run_ranks(checks_of_ends, 1, tmp_path)


def said_of_gpus(world: World) -> tuple[list[float], str]:
    os.environ["RAY_ADDRESS"] = "head:6379"
    from nc_dist.launch.ray_cluster import gpus_each

    with redirect_stdout(io.StringIO()) as said:
        given = [gpus_each(asked, found, "workers") for asked in (None, 0, 2) for found in ({}, {"GPU": 4.0})]
    return given, said.getvalue()


def test_workers_get_a_gpu_each_where_there_are_any_and_what_is_asked_for_anywhere() -> None:
    ((given, said),) = run_ranks(said_of_gpus, 1)
    assert given == [0, 1, 0, 0, 2, 2]
    assert said == "the cluster has no GPUs: workers run on CPUs; launch.gpus=1 waits for GPUs\n"
