"""Small engines on fixed data, for the tests of ZeRO: a ResNet with BatchNorm, 4 micro-batches a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nc_dist.backbones import SmallResNetSpec
from nc_dist.data.augment import InputSpec
from nc_dist.data.stream import Batch
from nc_dist.engine import DeepSpeedSpec, Engine, TorchSpec
from nc_dist.heads import MLPHead
from nc_dist.loop import Step, train_steps
from nc_dist.losses import CrossEntropy
from nc_dist.engine.make import make_engine
from nc_dist.model import Model, ModelSpec
from nc_dist.objective import Objective
from nc_dist.optim import SGD, AdamW, Schedule
from nc_dist.outputs import Outputs
from nc_dist.world import World

INPUT, MICROS, ROWS, CLASSES = InputSpec(size=8), 4, 6, 5
POISON = -1  # a label in place of all others: the loss of such a micro-batch is not a number
OPTIMISERS = {
    "sgd": SGD(weight_decay=1e-3, decay_norm_and_bias=False, layer_decay=0.7),
    "adamw": AdamW(decay_norm_and_bias=False, layer_decay=0.7),
}


class Poisonable(CrossEntropy):
    """Cross-entropy that is not a number where the labels say so."""

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        value = super().__call__(outputs, targets.clamp_min(0))
        return value * torch.nan if bool((targets == POISON).any()) else value


def small_model(classes: int = CLASSES, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    spec = ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=6), head=MLPHead(output=7))
    return Model(spec, classes)


def small_engine(
    world: World,
    zero: int | None,
    optim: str = "sgd",
    ema: float | None = None,
    model: Model | None = None,
    **spec: Any,
) -> Engine:
    """Plain torch for `zero` None; parameters are in several groups, of sizes that no number of ranks divides."""
    settings = TorchSpec(**spec) if zero is None else DeepSpeedSpec(zero=zero, **spec)  # type: ignore[arg-type]
    batch = (MICROS * ROWS, ROWS)
    return make_engine(model or small_model(), settings, OPTIMISERS[optim], batch, world, ema)


def fixed_data(world: World, steps: range, poisoned: Sequence[int] = ()) -> Iterator[list[Batch]]:
    """This rank's micro-batches of these steps; the last micro-batch of a poisoned one is."""
    for step in steps:
        micros = []
        for micro in range(MICROS):
            random = torch.Generator().manual_seed(1000 * step + micro)
            labels = torch.arange(ROWS) % CLASSES
            images = torch.randint(0, 256, (ROWS, 3, 8, 8), dtype=torch.uint8, generator=random)
            images[:, 0] = (images[:, 0] // 2) + (20 * labels).to(torch.uint8)[:, None, None]
            if step in poisoned and micro == MICROS - 1:
                labels = torch.full_like(labels, POISON)
            micros.append(Batch(images, labels, torch.arange(ROWS)))
        own = MICROS // world.size
        yield micros[world.rank * own : (world.rank + 1) * own]


def trained(
    engine: Engine, world: World, start: int, stop: int, poisoned: Sequence[int] = (), lr: float = 0.05
) -> list[Step]:
    """Steps start .. stop - 1."""
    objective = Objective(Poisonable(), INPUT, MICROS, 0, lr, Schedule(kind="constant", warmup=0), stop)
    return list(train_steps(engine, fixed_data(world, range(start, stop), poisoned), objective, world, start))


def losses(steps: list[Step]) -> list[float]:
    return [step.metrics()["train/loss"] for step in steps]


def weights(engine: Engine) -> dict[str, Tensor]:
    """All weights and buffers."""
    with engine.gathered() as model:
        return copy.deepcopy(model.state_dict())


def averages(engine: Engine) -> dict[str, Tensor]:
    with engine.averaged():
        return weights(engine)


def whole_state(engine: Any, world: World) -> dict[str, Tensor]:
    """Masters and moments of each parameter, put together from what the ranks hold (DeepSpeed's own functions for it
    fail where the optimiser has several groups).
    """
    zero, stage = engine._zero, engine.spec.zero
    if stage == 0:
        named = {name: {"": p, **zero.state[p]} for name, p in engine.module.named_parameters()}
        return {f"{n} {key}": v.detach().clone() for n, state in named.items() for key, v in state.items() if v.ndim}
    flats = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    groups = zero.fp16_groups if stage == 3 else zero.bit16_groups
    found = {}
    for flat, group in zip(flats, groups, strict=True):
        own = {"": flat, **zero.optimizer.state[flat]}
        for key in (key for key, v in own.items() if v.shape == flat.shape):
            parts, start = world.gather_objects(own[key].detach().clone()), 0
            for p in group:
                size = p.ds_numel if stage == 3 else p.numel()
                part = -(-size // world.size) if stage == 3 else size
                ranks = [each[start : start + part] for each in parts] if stage == 3 else [torch.cat(parts)[start:]]
                found[f"{zero.param_names[p]} {key}"] = torch.cat(ranks)[:size]
                start += part
    return found


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor, for those that differ."""
    assert a.keys() == b.keys()
    found = {name: float((a[name].double() - b[name].double()).abs().max()) for name in a}
    return {name: value for name, value in found.items() if value}


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(differences(a, b).values(), default=0.0)
