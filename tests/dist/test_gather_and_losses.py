"""Gradients through the gather, and a coupled loss: the same numbers however micro-batches are spread over ranks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_ranks

from nc_dist.data.augment import InputSpec, normalise
from nc_dist.data.stream import Batch
from nc_dist.engine import TorchSpec
from nc_dist.engine_torch import TorchEngine
from nc_dist.loop import train_steps
from nc_dist.losses import CrossEntropy, SupCon
from nc_dist.model import Model, ModelSpec
from nc_dist.objective import Objective
from nc_dist.optim import SGD, Schedule
from nc_dist.outputs import Outputs
from nc_dist.world import World

STEPS, MICROS, B, SIZE = 3, 4, 6, 8


def gathered_gradient(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """d/dx of a loss of all ranks' rows, which each rank weighs differently."""
    mine = torch.arange(6, dtype=torch.float64).view(3, 2) + 10 * world.rank
    mine.requires_grad_()
    rows = world.gather(mine)
    (rows.square().sum() * (world.rank + 1)).backward()
    return rows.detach(), mine.grad


def micro_batches(views: int) -> list[list[Batch]]:
    """Of each step, all micro-batches."""
    random = np.random.default_rng(0)
    return [
        [
            Batch(
                torch.from_numpy(random.integers(0, 256, (views * B, 3, SIZE, SIZE), dtype=np.uint8)),
                torch.from_numpy(random.integers(0, 3, B)),
                torch.arange(B),
            )
            for _ in range(MICROS)
        ]
        for _ in range(STEPS)
    ]


def trained(world: World, loss: Any, micros: int) -> dict[str, Any]:
    """Three fp64 steps on the first `micros` micro-batches of each: losses, first gradients, final weights, buffers."""
    torch.manual_seed(0)
    backbone = {"kind": "small_resnet", "name": "resnet8", "width": 4}
    head = {"kind": "mlp", "output": 16} if loss.coupled else {"kind": "none"}
    spec = ModelSpec.model_validate({"backbone": backbone, "head": head})
    engine = TorchEngine(Model(spec, 3 * loss.uses_logits), TorchSpec(precision="fp64"), SGD(lr=0.1), world)
    gradients: list[dict[str, torch.Tensor]] = []

    def keep(*_: Any) -> None:
        gradients.append({name: p.grad.clone() for name, p in engine.module.named_parameters()})

    engine.optimizer.register_step_pre_hook(keep)
    own = micros // world.size
    data = [step[world.rank * own : (world.rank + 1) * own] for step in micro_batches(loss.views)]
    objective = Objective(loss, InputSpec(size=SIZE), micros, 0, 0.1, Schedule(kind="constant", warmup=0), STEPS)
    losses = [step.metrics()["train/loss"] for step in train_steps(engine, data, objective, world)]
    return {"losses": losses, "gradients": gradients[0], "state": engine.module.state_dict()}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-9)
    for part in ("gradients", "state"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            torch.testing.assert_close(found[part][name], value, rtol=1e-9, atol=1e-11, msg=name)


CASES = {
    f"{loss.kind}, {micros} micro-batches": (loss, micros) for loss in (CrossEntropy(), SupCon()) for micros in (2, 4)
}


def each_case(world: World) -> dict[str, Any]:
    found = {name: trained(world, *case) for name, case in CASES.items() if case[1] % world.size == 0}
    return {"gather": gathered_gradient(world), **found}


@lru_cache
def over_ranks(size: int) -> list[Any]:
    return run_ranks(each_case, size)


@pytest.mark.parametrize("size", [2, 4])
def test_gather_returns_all_rows_and_sums_their_gradients(size: int) -> None:
    everything = torch.cat([torch.arange(6, dtype=torch.float64).view(3, 2) + 10 * r for r in range(size)])
    weight = size * (size + 1) / 2  # every rank used every row, rank r with weight r + 1
    for rank, found in enumerate(over_ranks(size)):
        rows, gradient = found["gather"]
        assert torch.equal(rows, everything)
        assert torch.equal(gradient, 2 * weight * everything[3 * rank : 3 * rank + 3])


@pytest.mark.parametrize(("case", "size"), [*((case, 2) for case in CASES), *((c, 4) for c in CASES if "4" in c)])
def test_loss_gradients_weights_and_batch_norm_do_not_know_the_world_size(case: str, size: int) -> None:
    found = [rank[case] for rank in over_ranks(size)]
    assert_same(found[0], trained(World(), *CASES[case]))
    for other in found[1:]:
        for name, value in found[0]["state"].items():
            assert torch.equal(value, other["state"][name]), f"{name} differs by rank"


def test_supcon_of_micro_batches_is_that_of_the_whole_batch() -> None:
    """Cached embeddings: two micro-batches of 6 against one direct loss over both, through the same network."""
    expected = trained(World(), SupCon(), 2)
    torch.manual_seed(0)
    spec = {"backbone": {"kind": "small_resnet", "name": "resnet8", "width": 4}, "head": {"kind": "mlp", "output": 16}}
    model = Model(ModelSpec.model_validate(spec), 0).double()
    first = micro_batches(2)[0][:2]
    images = [normalise(batch.images, InputSpec(size=SIZE), torch.float64) for batch in first]
    embeddings = torch.cat([model(x).embedding_BE for x in images])
    loss = SupCon()(Outputs(embeddings, embeddings, None), torch.cat([batch.labels.repeat(2) for batch in first]))
    loss.backward()
    assert loss.item() == pytest.approx(expected["losses"][0], rel=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected["gradients"][name], rtol=1e-9, atol=1e-12, msg=name)
