"""Torch against DeepSpeed at an equal world size: two gloo ranks, fp32, one journey after another.

architecture.md 6e: first 5 steps to 1e-5 with clipping and accumulation; 50 steps to 1e-6 without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import SMALL, curve, relative, run_ranks

from nc_dist.config import PretrainRun
from nc_dist.launch.worker import run_journey
from nc_dist.run_folder import prepare
from nc_dist.spec import load

pytestmark = pytest.mark.slow

ENGINES = {"torch": ["engine.kind=torch"]}
ENGINES |= {f"zero{stage}": ["engine.kind=deepspeed", f"engine.zero={stage}"] for stage in range(4)}
CLIPPED = ["epochs=0.12", "engine.clip=1.2"]  # 5 steps; two micro-batches for each of two ranks
VARIED = {  # 5 steps each
    "mixup": [*CLIPPED, "data.mix.kind=mixup", "ema=0.8", "measure_every=5", "optim.layer_decay=0.7"],
    "supcon": [*CLIPPED, "loss.kind=supcon", "model.head.kind=mlp", "engine.clip=0.2", "measure_every=5"],
    "pgd": [*CLIPPED, "adversary={kind: pgd, epsilon: 1.0}", "engine.recompute=true"],
}
UNCLIPPED = ["engine.clip=0.0", "batch.micro=16", "measure_every=50"]  # 50 steps, one micro-batch for each rank


def train(world: Any, out: Path, settings: list[str]) -> dict[str, tuple[list[float], ...]]:
    """Losses and gradient norms of every step, and NC1 with averaged weights where there are any, by engine."""
    for name, engine in ENGINES.items():
        run = load(PretrainRun, SMALL, [f"out={out / name}", "save_every=1000", *settings, *engine])
        if world.rank == 0:
            prepare(run)
        world.barrier()
        run_journey("pretrain", run)
    keys = ("train/loss", "train/grad_norm", "nc/ema_train_before/nc1")
    return {name: tuple(list(curve(out / name, key).values()) for key in keys) for name in ENGINES}


def train_varied(world: Any, out: Path) -> dict[str, Any]:
    return {name: train(world, out / name, settings) for name, settings in VARIED.items()}


def worst(curves: dict[str, Any], engine: str) -> float:
    """Largest relative difference of a loss, gradient norm or averaged model's NC1 to plain torch's."""
    found = [
        max((relative(a, b) for a, b in zip(ours, expected, strict=True)), default=0.0)
        for ours, expected in zip(curves[engine], curves["torch"], strict=True)
    ]
    print(f"{engine}: loss {found[0]:.1e}, gradient norm {found[1]:.1e}, NC1 of averages {found[2]:.1e}")
    return max(found)


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(train, 2, tmp_path_factory.mktemp("clipped"), CLIPPED, timeout=150)[0]


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(train_varied, 2, tmp_path_factory.mktemp("varied"), timeout=300)[0]


@pytest.fixture(scope="module")
def unclipped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(train, 2, tmp_path_factory.mktemp("unclipped"), UNCLIPPED, timeout=150)[0]


@pytest.mark.parametrize("engine", list(ENGINES)[1:])
def test_zero_is_torch_with_clipping_and_accumulation(clipped: Any, engine: str) -> None:
    assert len(clipped["torch"][0]) == 5 and min(clipped["torch"][1]) > 1.2, clipped["torch"]
    assert worst(clipped, engine) < 1e-5


@pytest.mark.parametrize("engine", list(ENGINES)[1:])
@pytest.mark.parametrize("case", list(VARIED))
def test_zero_is_torch_with_mixing_averages_layer_decay_coupling_and_attacks(
    varied: Any, case: str, engine: str
) -> None:
    losses, norms, averaged = varied[case]["torch"]
    assert len(losses) == 5 and max(norms) > 0.2 and len(averaged) == 2 * (case == "mixup"), varied[case]["torch"]
    assert worst(varied[case], engine) < 1e-5


@pytest.mark.parametrize("engine", list(ENGINES)[1:])
def test_zero_is_torch_without_clipping_though_gradients_exceed_one(unclipped: Any, engine: str) -> None:
    norms = unclipped["torch"][1]
    assert len(norms) == 50 and sum(norm > 1 for norm in norms) >= 10
    assert worst(unclipped, engine) < 1e-6
