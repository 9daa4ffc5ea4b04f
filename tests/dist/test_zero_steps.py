"""DeepSpeed's steps on two gloo ranks: what is skipped moves nothing, averages and gradients of images are torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run_ranks
from small_engines import (
    averages,
    differences,
    fixed_data,
    losses,
    small_engine,
    trained,
    weights,
    whole_state,
    worst,
)

from nc_dist.data.augment import normalise
from nc_dist.world import World

pytestmark = pytest.mark.slow
STAGES = (0, 1, 2, 3)


def images(world: World) -> torch.Tensor:
    return normalise(next(fixed_data(world, range(99, 100)))[0].images, small_engine_input())


def small_engine_input() -> Any:
    from small_engines import INPUT

    return INPUT


def skipping(world: World) -> dict[Any, Any]:
    """By stage and optimiser: did a poisoned step move anything, and does the next one train as if it had not been?"""
    found: dict[Any, Any] = {}
    for zero in STAGES:
        for optim in ("sgd", "adamw"):
            free, poisoned = (small_engine(world, zero, optim, ema=0.9, clip=1.0) for _ in range(2))
            for engine in (free, poisoned):
                trained(engine, world, 0, 2)
            before = [weights(poisoned), averages(poisoned), whole_state(poisoned, world)]
            (step,) = trained(poisoned, world, 2, 3, poisoned=[2])
            after = [weights(poisoned), averages(poisoned), whole_state(poisoned, world)]
            moved = [differences(a, b) for a, b in zip(before, after, strict=True)]
            ours, theirs = trained(poisoned, world, 3, 5), trained(free, world, 3, 5)
            found[zero, optim] = (
                step.applied,
                moved,
                [step.applied for step in ours],
                losses(ours) == losses(theirs),
                [worst(f(poisoned), f(free)) for f in (weights, averages)],
            )
    return found


def test_a_step_with_a_loss_that_is_no_number_on_one_rank_moves_nothing_in_any_stage() -> None:
    for found in run_ranks(skipping, 2, timeout=200):
        for case, (applied, moved, next_applied, same, later) in found.items():
            assert not applied and moved == [{}, {}, {}], (case, moved)
            assert next_applied == [True, True] and same and later == [0.0, 0.0], (case, same, later)


def averaging(world: World) -> dict[Any, Any]:
    """Averages after a few steps, what an eval forward makes of them, and whether the weights come back."""
    found: dict[Any, Any] = {}
    x = images(world)
    for zero in (None, *STAGES):
        engine = small_engine(world, zero, "sgd", ema=0.9)
        trained(engine, world, 0, 5)
        before = weights(engine)
        with engine.averaged():
            logits = engine.eval_forward(x).logits
        kept = averages(engine)
        found[zero] = (kept, logits, differences(before, weights(engine)), worst(before, kept))
        trained(engine, world, 5, 6)
        found[zero] += (weights(engine),)
    return found


def test_averages_are_those_of_plain_torch_and_weights_come_back() -> None:
    for found in run_ranks(averaging, 2, timeout=120):
        kept, logits, _, apart, later = found[None]
        assert apart > 1e-3
        for zero in STAGES:
            ours = found[zero]
            assert worst(ours[0], kept) < 1e-6 and torch.allclose(ours[1], logits, atol=1e-5), zero
            assert ours[2] == {} and worst(ours[4], later) < 1e-5, (zero, ours[2])


def attacking(world: World) -> dict[Any, Any]:
    """Gradients of the images, and training that goes on after they were asked for."""
    found: dict[Any, Any] = {}
    for zero in (None, *STAGES):
        engine, quiet = small_engine(world, zero), small_engine(world, zero)
        for each in (engine, quiet):
            trained(each, world, 0, 2)
        x = images(world).requires_grad_()
        (gradient,) = torch.autograd.grad(engine.eval_forward(x, gradients=True).logits.square().sum(), x)
        none = all(p.grad is None or not p.grad.any() for p in engine.module.parameters())
        ours, theirs = (losses(trained(each, world, 2, 4)) for each in (engine, quiet))
        found[zero] = gradient, none, ours == theirs, worst(weights(engine), weights(quiet))
    return found


def test_gradients_of_images_are_those_of_plain_torch_and_leave_the_training_alone() -> None:
    for found in run_ranks(attacking, 2, timeout=120):
        for zero in STAGES:
            gradient, none, same, apart = found[zero]
            assert torch.allclose(gradient, found[None][0], rtol=1e-4, atol=1e-5), zero
            assert none and same and apart == 0, (zero, none, same, apart)
