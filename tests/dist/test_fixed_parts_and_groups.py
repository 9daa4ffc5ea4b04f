"""Fixed head and classifier, layer-wise decay and LARS on two gloo ranks: each engine trains as plain torch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SMALL, curve, relative, run_ranks

from nc_dist.config import PretrainRun
from nc_dist.heads.etf_classifier import simplex_etf
from nc_dist.launch.worker import run_journey
from nc_dist.model import load_exported
from nc_dist.run_folder import prepare
from nc_dist.spec import load

pytestmark = pytest.mark.slow

SHORT = ["save_every=1000", "epochs=0.1", "engine.clip=1.2"]
FIXED = ["model.head.kind=etf", "model.head.hidden=40", "model.head.output=36", "model.classifier.kind=etf"]
GROUPS = ["optim.layer_decay=0.7", "optim.decay_norm_and_bias=false"]
LARS = ["optim.kind=lars", "optim.lr=20", "optim.layer_decay=0.7"]
ENGINES = {"torch": ["engine.kind=torch"]}
ENGINES |= {f"zero{stage}": ["engine.kind=deepspeed", f"engine.zero={stage}"] for stage in (0, 2, 3)}
CASES = {f"fixed {name}": [*ENGINES[name], *FIXED, *GROUPS] for name in ("torch", "zero2", "zero3")}
CASES |= {f"lars {name}": [*ENGINES[name], *LARS] for name in ("torch", "zero0")}


def train(world: Any, out: Path) -> dict[str, list[float]]:
    """Losses of 4 steps by case."""
    for name, settings in CASES.items():
        run = load(PretrainRun, SMALL, [f"out={out / name}", *SHORT, *settings])
        if world.rank == 0:
            prepare(run)
        world.barrier()
        run_journey("pretrain", run)
    return {name: list(curve(out / name).values()) for name in CASES}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    out = tmp_path_factory.mktemp("runs")
    return out, run_ranks(train, 2, out, timeout=300)[0]


@pytest.mark.parametrize("case", [name for name in CASES if "torch" not in name])
def test_every_engine_has_torchs_losses(trained: tuple[Path, dict[str, list[float]]], case: str) -> None:
    losses = trained[1]
    kind, _ = case.split()
    assert len(losses[case]) == 4 and losses["fixed torch"] != losses["lars torch"]
    worst = max(relative(a, b) for a, b in zip(losses[case], losses[f"{kind} torch"], strict=True))
    print(f"{case}: {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.parametrize("engine", ["torch", "zero2", "zero3"])
def test_what_is_fixed_comes_out_of_training_as_it_went_in(trained: tuple[Path, Any], engine: str) -> None:
    model = load_exported(trained[0] / f"fixed {engine}").model
    assert model.classifier is not None and model.classifier.weight.equal(simplex_etf(10, 36, 0))
    fresh, _ = model.spec.head.build(model.dim)
    for name, value in fresh.state_dict().items():
        assert value.equal(model.head.state_dict()[name]) and isinstance(value, torch.Tensor)
