"""nc.watch in a plain DDP script and under DeepSpeed: over ranks the metrics are those of one process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_ddp import BATCH, CLASSES, LAYERS, SAMPLES, make_data, make_net
from processes import ROOT, free_ports, run_command, run_ranks, said
from torch import nn

from nc_dist import nc
from nc_dist.world import World

SCRIPT = Path(__file__).with_name("plain_ddp.py").relative_to(ROOT)
NOTHING_STAYS = {  # of the small weights between forwards, in stage 3
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
BOUND = {"float32": 1e-6, "float64": 1e-9}


@lru_cache
def plain(ranks: int, dtype: str, *options: str) -> dict[str, Any]:
    """What the script prints: run by torchrun, or for one rank without it, which is faster."""
    torchrun = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    launcher = [*torchrun, f"--nproc-per-node={ranks}"] if ranks > 1 else []
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    done = run_command([sys.executable, *launcher, str(SCRIPT), dtype, *options], 60, **({} if launcher else alone))
    assert done.returncode == 0, said(done)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def assert_same(found: dict[str, Any], expected: dict[str, Any], bound: float) -> None:
    """All metrics but those that depend on which rank has which sample."""
    assert found.keys() == expected.keys() == set(LAYERS)
    for layer, values in expected.items():
        assert values["N"] == SAMPLES and values["nc1"] is not None and values["ncc_acc1"] is not None
        assert found[layer].keys() == values.keys() and found[layer]["reasons"] == values["reasons"]
        for name in values.keys() - {"nc1_split_half", "warnings", "reasons"}:
            close = isinstance(values[name], float | list)
            wanted = pytest.approx(values[name], rel=bound, abs=bound**2) if close else values[name]
            assert found[layer][name] == wanted, (layer, name)
    assert expected["input:fc"]["nc4"] is not None and expected["input:fc"]["nc3_bias"] is not None


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "dtype", "options"), [(3, "float64", ("idle",)), (2, "float32", ())])
def test_a_plain_ddp_script_measures_what_one_process_does(ranks: int, dtype: str, options: tuple[str, ...]) -> None:
    assert_same(plain(ranks, dtype, *options), plain(1, dtype), BOUND[dtype])


def under_deepspeed(world: World, stages: Sequence[int]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Metrics after the script's training, of each ZeRO stage; and again with the classifier's weights given."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be built
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    images, labels = make_data()
    found = []
    for stage in stages:
        config = {
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": BATCH // world.size,
            "zero_optimization": {"stage": stage, **NOTHING_STAYS},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
        }
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)
        for step in range(4):
            rows = torch.arange(step * BATCH + world.rank, (step + 1) * BATCH, world.size)
            engine.backward(nn.functional.cross_entropy(engine(images[rows]), labels[rows]))
            engine.step()
        engine.eval()
        with torch.no_grad(), nc.watch(engine, LAYERS, CLASSES) as w:
            for rows in torch.arange(world.rank, SAMPLES, world.size).split(BATCH):
                engine(images[rows])
                w.update(labels[rows])
        read = w.metrics()
        with deepspeed.zero.GatheredParameters(list(engine.module.fc.parameters())):
            classifier = engine.module.fc.weight.detach().clone(), engine.module.fc.bias.detach().clone()
        found.append((read, w.metrics(classifier)))
    return found


def refusals(world: World) -> list[str]:
    """What `metrics` says on this rank: nobody has seen a sample, and ranks watch features of different sizes."""
    said = []
    for net, sees in ((nn.Flatten(), False), (nn.Linear(3, 4 + world.rank), True)):
        with nc.watch(nn.Sequential(net), ["0"], CLASSES) as w:
            if sees:
                net(torch.zeros(2, 3))
                w.update(torch.tensor([0, 1]))
        with pytest.raises(ValueError) as caught:
            w.metrics()
        said.append(str(caught.value))
    return said


def both(world: World) -> tuple[Any, list[str]]:
    return under_deepspeed(world, (2, 3)), refusals(world)


@lru_cache
def over_two_ranks() -> list[Any]:
    return run_ranks(both, 2)


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused_on_every_rank() -> None:
    (_, first), (_, second) = over_two_ranks()
    assert first == second and "no rank has seen" in first[0] and "(4, 'none')}, {'0': (5, 'none')}" in first[1]


@pytest.mark.slow
def test_a_deepspeed_engine_is_measured_as_the_plain_script_is_and_alike_on_every_rank() -> None:
    (first, _), (second, _) = over_two_ranks()
    assert first == second
    (read, given), (partitioned, gathered) = first
    expected = plain(1, "float32")
    for found in (read, given, gathered):
        assert_same(found, expected, BOUND["float32"])
    assert "partitioned" in partitioned["input:fc"]["reasons"]["nc4"]
    assert partitioned["input:fc"]["nc1"] == gathered["input:fc"]["nc1"]
