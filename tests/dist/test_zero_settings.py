"""DeepSpeed with every setting on two gloo ranks, beside plain torch with the same setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import relative, run_ranks
from small_engines import averages, losses, small_engine, small_model, trained, weights, whole_state, worst

from nc_dist.model import Model
from nc_dist.world import World

pytestmark = pytest.mark.slow
STAGES = (0, 1, 2, 3)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "no channels_last": {"channels_last": False},
    "recompute": {"recompute": True, "clip": 0.5},
    "fp16": {"precision": "fp16", "clip": 0.5},  # refused by the checks of a run, where there is no GPU
    "bf16 recompute": {"precision": "bf16", "recompute": True},
}
OFFLOADED = [(1, "sgd", False), (2, "sgd", False), (2, "adamw", False), (3, "sgd", True), (3, "adamw", False)]


def everything(world: World, settings: dict[str, dict[str, Any]], steps: int) -> dict[Any, Any]:
    """Losses, weights and their types by setting and stage, None for torch."""
    found: dict[Any, Any] = {}
    for name, spec in settings.items():
        for zero in (None, *STAGES):
            engine = small_engine(world, zero, **spec)
            curve = losses(trained(engine, world, 0, steps))
            found[name, zero] = curve, weights(engine)
    return found


def test_every_setting_gives_what_plain_torch_gives_with_it() -> None:
    for found in run_ranks(everything, 2, SETTINGS, 6, timeout=200):
        for (name, zero), (curve, whole) in found.items():
            expected, weights_of_torch = found[name, None]
            assert {t.dtype for t in whole.values() if t.is_floating_point()} == {torch.float32}
            assert max(map(relative, curve, expected)) < 1e-4, (name, zero, curve, expected)
            assert max(map(relative, curve, found["plain", zero][0])) < 0.02, (name, zero)
            assert curve[-1] < curve[0] and worst(whole, weights_of_torch) < 1e-3
        assert found["bf16", 1][0] != found["plain", 1][0]


def scaled(world: World) -> list[tuple[float, float, bool, float]]:
    """In fp16, by stage: gradient norm of a very small loss and the largest move, then what an overflow does."""
    found = []
    x = torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)
    for zero in (None, *STAGES):
        engine: Any = small_engine(world, zero, precision="fp16")
        before = weights(engine)
        engine.backward(engine.forward(x).logits.float().square().sum() * 1e-7)
        assert engine.step(0.1)
        norm, moved = engine.grad_norm, worst(before, weights(engine))
        engine.backward(engine.forward(x).logits.float().square().sum() * 1e6)
        applied = engine.step(0.1)
        scale = engine.scaler.get_scale() if zero is None else engine._scale.value
        found.append((norm, moved, applied, scale))
    return found


def test_in_fp16_small_gradients_survive_and_an_overflow_halves_the_scale() -> None:
    for found in run_ranks(scaled, 2, timeout=100):
        norm, moved, applied, scale = found[0]
        assert norm > 0 and not applied and scale == 2.0**15
        for ours in found[1:]:
            assert ours[0] == pytest.approx(norm, rel=1e-4) and ours[1] == pytest.approx(moved, rel=1e-3)
            assert ours[2:] == (False, scale)


def offloaded(world: World, folder: Path) -> dict[Any, Any]:
    """Losses with and without offload, whether a poisoned step moved anything, whether a copy goes on bit for bit."""
    found = {}
    for zero, optim, parameters in OFFLOADED:
        lr = 0.05 if optim == "sgd" else 1e-3
        plain = small_engine(world, zero, optim, clip=0.5)
        moved, copied = (
            small_engine(world, zero, optim, 0.9, clip=0.5, offload_optimizer=True, offload_parameters=parameters)
            for _ in range(2)
        )
        expected, ours = (losses(trained(engine, world, 0, 4, lr=lr)) for engine in (plain, moved))
        before = weights(moved) | whole_state(moved, world) | averages(moved)
        (skipped,) = trained(moved, world, 4, 5, poisoned=[4], lr=lr)
        still = worst(before, weights(moved) | whole_state(moved, world) | averages(moved))
        own = folder / f"{zero}{optim}{parameters}"
        own.mkdir(exist_ok=True)
        moved.save(own, {})
        world.barrier()
        copied.load(own)
        curves = [losses(trained(engine, world, 5, 7, lr=lr)) for engine in (moved, copied)]
        bitwise = curves[0] == curves[1] and worst(weights(moved), weights(copied)) == 0
        found[zero, optim, parameters] = expected, ours, skipped.applied, still, bitwise
    return found


def test_offload_to_the_cpu_changes_no_curve(tmp_path: Path) -> None:
    for found in run_ranks(offloaded, 2, tmp_path, timeout=200):
        for case, (expected, ours, applied, still, bitwise) in found.items():
            assert max(map(relative, ours, expected)) < 1e-5, (case, ours, expected)
            assert not applied and still == 0 and bitwise, (case, applied, still, bitwise)


def frozen_stem(seed: int = 0) -> Model:
    model = small_model(seed=seed)
    model.backbone.net.conv1.requires_grad_(False)  # type: ignore[union-attr]
    return model


def partly(world: World, folder: Path) -> list[Any]:
    """A frozen stem, also saved and loaded into another, and a model without classifier; by stage."""
    found = []
    for zero in (None, *STAGES):
        engine = small_engine(world, zero, ema=0.9, model=frozen_stem())
        trained(engine, world, 0, 3)
        for _ in range(2):  # stage 3 fetches ahead what a backward would need
            engine.eval_forward(torch.zeros(4, 3, 8, 8))
        saved = folder / f"{zero}"
        saved.mkdir(exist_ok=True)
        engine.save(saved, {})
        world.barrier()
        again = small_engine(world, zero, ema=0.9, model=frozen_stem(seed=7))
        again.load(saved)
        assert worst(weights(again), weights(engine)) == 0, zero
        bare = small_engine(world, zero, model=small_model(classes=0))
        outputs = bare.forward(torch.full((4, 3, 8, 8), 0.1 * (1 + world.rank)))
        bare.backward(outputs.embedding_BE.square().sum())
        assert bare.step(0.01)
        found.append((weights(engine), averages(engine), weights(bare)))
    return found


def test_frozen_parameters_stay_and_a_model_without_classifier_trains(tmp_path: Path) -> None:
    start = small_model().state_dict()
    for found in run_ranks(partly, 2, tmp_path, timeout=100):
        for whole, kept, bare in found:
            stem = "backbone.net.conv1.weight"
            assert (
                worst({stem: whole[stem]}, {stem: start[stem]}) == worst({stem: kept[stem]}, {stem: start[stem]}) == 0
            )
            assert worst(whole, dict(start)) > 1e-3 and not any("classifier" in name for name in bare)
            for ours, theirs in zip((whole, kept, bare), found[0], strict=True):
                assert worst(ours, theirs) < 1e-6
