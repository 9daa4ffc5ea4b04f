"""What a run on two ranks says about its data and its features is what one process says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import SMALL, read_json, relative, rows, run_ranks

from nc_dist.config import MeasureRun, PretrainRun
from nc_dist.data.augment import InputSpec
from nc_dist.data.catalog import open_source
from nc_dist.data.stream import eval_batches
from nc_dist.launch.worker import run_journey
from nc_dist.run_folder import prepare
from nc_dist.spec import load, validate
from nc_dist.world import World

VARIANTS = {
    "ce": ["loss.kind=ce"],
    "supcon": ["loss.kind=supcon", "model.head.kind=mlp", "model.head.output=16", "batch.micro=16"],
    "zero3": ["engine.kind=deepspeed", "engine.zero=3"],
}
BATCH = 34  # a tenth of the samples: all forwards of the run and of measure have one shape, so no kernel differs
EVERY_SAMPLE = ["data.holdout_per_class=0", "probe.per_class=null", f"probe.batch={BATCH}", "epochs=2"]


def pretrained(world: World, shards: Path, out: Path) -> None:
    for name, settings in VARIANTS.items():
        overrides = [f"out={out / name}", f"data.train={shards}", *EVERY_SAMPLE, *settings]
        run = load(PretrainRun, SMALL, overrides)
        if world.rank == 0:
            prepare(run)
        world.barrier()
        run_journey("pretrain", run)


@pytest.fixture(scope="module")
def runs(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two_ranks")
    run_ranks(pretrained, 2, small_shards, out, timeout=120)
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_nc_of_two_ranks_is_that_of_measure_in_one_process(
    runs: Path, small_shards: Path, tmp_path: Path, variant: str
) -> None:
    result = read_json(runs / variant / "result.json")
    tree = {"out": str(tmp_path / "nc"), "model": str(runs / variant), "data": str(small_shards), "batch": BATCH}
    measure = validate(MeasureRun, tree, "measure")
    prepare(measure)
    measured = run_journey("measure", measure)["nc"]

    assert result["world_size"] == 2 and measured["before"]["N"] == len(open_source(str(small_shards)).labels)
    last = [row for row in rows(runs / variant) if "nc/train_before/nc1" in row][-1]
    assert last["step"] == result["steps"]
    assert relative(result["nc1_source"], measured["before"]["nc1"]) < 1e-6
    for place in ("before", "after"):
        for name in ("nc1", "nc1_trace", "nc2_equiangular", "nc2_equinorm", "ncc_acc1"):
            live = last[f"nc/train_{place}/{name}"]
            assert live == result["nc"][f"train_{place}"][name]
            print(f"{place} {name}: {relative(live, measured[place][name]):.1e}")
            assert relative(live, measured[place][name]) < 1e-6, f"{place} {name}"


def test_uneven_classes_are_uneven(small_shards: Path) -> None:
    counts = np.bincount(open_source(str(small_shards)).labels)
    assert counts.max() >= 3 * counts.min() and len(np.unique(counts)) == len(counts)


def positions_seen(world: World, shards: Path, batch: int) -> list[list[int]]:
    source = open_source(str(shards))
    chosen = np.arange(7, len(source.labels), 2)
    batches = eval_batches(source, chosen, InputSpec(size=8), batch, world)
    return [loaded.positions.tolist() for loaded in batches]


@pytest.mark.parametrize("size", [2, 3])
def test_evaluation_sees_each_sample_once_in_equally_many_batches(small_shards: Path, size: int) -> None:
    found: list[Any] = run_ranks(positions_seen, size, small_shards, 32)
    everything = sorted(position for rank in found for batch in rank for position in batch)
    assert everything == list(range(7, len(open_source(str(small_shards)).labels), 2))
    assert len({len(rank) for rank in found}) == 1, "a forward under ZeRO-3 is collective"
