"""Gradients through the gather, and coupled terms: the same numbers however micro-batches are spread over ranks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_ranks
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from nc_dist.backbones import from_vit
from nc_dist.data.augment import InputSpec, normalise
from nc_dist.data.mix import Mixup, NoMix
from nc_dist.data.stream import Batch
from nc_dist.engine import TorchSpec
from nc_dist.engine.torch_engine import TorchEngine
from nc_dist.loop import train_steps
from nc_dist.losses import (
    BCE,
    MSE,
    CosineSoftmax,
    CrossEntropy,
    FeatureNorm,
    Focal,
    KoLeo,
    LabelSmoothing,
    LogitNorm,
    LogitPenalty,
    LossSpec,
    RegulariserSpec,
    SquaredError,
    SupCon,
    WithinClass,
)
from nc_dist.model import Model, ModelSpec
from nc_dist.objective import Objective
from nc_dist.optim import SGD, Schedule
from nc_dist.outputs import Outputs
from nc_dist.world import World

STEPS, MICROS, B, SIZE, K = 3, 4, 6, 8, 4
SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]
BACKBONE = {"kind": "small_resnet", "name": "resnet8", "width": 4}

OTHER = ("train/acc1", "train/lr", "train/grad_norm")  # what a step tells besides the objective

Terms = tuple[LossSpec, *tuple[RegulariserSpec, ...]]


def gathered_gradient(world: World) -> tuple[Tensor, Tensor]:
    """d/dx of a loss of all ranks' rows, which each rank weighs differently."""
    mine = torch.arange(6, dtype=torch.float64).view(3, 2) + 10 * world.rank
    mine.requires_grad_()
    rows = world.gather(mine)
    (rows.square().sum() * (world.rank + 1)).backward()
    return rows.detach(), mine.grad


def micro_batches(views: int) -> list[list[Batch]]:
    """Of each step, all micro-batches; the last class has one sample in the whole step."""
    random = np.random.default_rng(0)

    def batch(j: int) -> Batch:
        images = random.integers(0, 256, (views * B, 3, SIZE, SIZE), dtype=np.uint8)
        labels = random.integers(0, K - 1, B)
        labels[:1] = K - 1 if j == 0 else labels[:1]
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), torch.arange(B))

    return [[batch(j) for j in range(MICROS)] for _ in range(STEPS)]


def head_of(loss: LossSpec) -> dict[str, Any]:
    return {"kind": "none"} if loss.uses_logits else {"kind": "mlp", "output": 16}


def trained(
    world: World, model: Model, terms: Terms, micros: int, steps: int = STEPS, mix: Any = None
) -> dict[str, Any]:
    """fp64 steps on the first `micros` micro-batches of each: what was told, first gradients, final state."""
    engine = TorchEngine(model, TorchSpec(precision="fp64"), SGD(lr=0.1), world)
    gradients: list[dict[str, Tensor]] = []

    def keep(*_: Any) -> None:
        gradients.append({name: p.grad.clone() for name, p in engine.module.named_parameters()})

    engine.optimizer.register_step_pre_hook(keep)
    loss, *regularisers = terms
    own = micros // world.size
    data = [step[world.rank * own : (world.rank + 1) * own] for step in micro_batches(loss.views)[:steps]]
    constant = Schedule(kind="constant", warmup=0)
    mixing = mix or NoMix()
    made = Objective(loss, InputSpec(size=SIZE), micros, 0, 0.1, constant, steps, mixing, tuple(regularisers))
    told = [step.metrics() for step in train_steps(engine, data, made, world)]
    return {"told": told, "gradients": gradients[0], "state": engine.module.state_dict()}


def resnet(loss: LossSpec) -> Model:
    torch.manual_seed(0)
    return Model(ModelSpec.model_validate({"backbone": BACKBONE, "head": head_of(loss)}), K * loss.uses_logits)


def vit(loss: LossSpec) -> Model:
    """Without BatchNorm a sample's outputs do not depend on its micro-batch."""
    torch.manual_seed(0)
    net = VisionTransformer(SIZE, 4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8)
    net.heads = nn.Identity()
    spec = {"backbone": BACKBONE, "head": head_of(loss), "classifier": {"kind": loss.classifier or "linear"}}
    return Model(ModelSpec.model_validate(spec), K * loss.uses_logits, backbone=from_vit(net))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for one, other in zip(found["told"], expected["told"], strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    for part in ("gradients", "state"):
        assert_close(found[part], expected[part])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


# Curves of a model with BatchNorm: terms, micro-batches of a step, mixing.
CURVES: dict[str, tuple[Terms, int, Any]] = {
    "ce, 2 micro-batches": ((CrossEntropy(),), 2, None),
    "ce, 4 micro-batches": ((CrossEntropy(),), 4, None),
    "supcon, 2 micro-batches": ((SupCon(),), 2, None),
    "supcon, 4 micro-batches": ((SupCon(),), 4, None),
    "mixup with KoLeo, 4 micro-batches": ((CrossEntropy(), KoLeo(weight=0.1)), 4, Mixup(alpha=1)),
}
# One step of a model without it, which is to be that of one batch in one process.
OBJECTIVES: dict[str, Terms] = {
    "ce": (CrossEntropy(),),
    "label_smoothing": (LabelSmoothing(),),
    "focal": (Focal(),),
    "mse": (MSE(),),
    "squared_error": (SquaredError(),),
    "bce": (BCE(),),
    "cosine_softmax": (CosineSoftmax(),),
    "logit_norm": (LogitNorm(),),
    "logit_penalty": (LogitPenalty(beta=1),),
    "supcon": (SupCon(),),
    "supcon of one view": (SupCon(two_views=False),),
    "feature norm": (CrossEntropy(), FeatureNorm(weight=0.3)),
    "KoLeo": (CrossEntropy(), KoLeo(weight=0.3)),
    "KoLeo in micro-batches": (CrossEntropy(), KoLeo(weight=0.3, gathered=False)),
    "variability kept": (CrossEntropy(), WithinClass(weight=-0.3)),
    "two views with KoLeo": (SupCon(), KoLeo(weight=0.3)),
    "two views with all": (
        SupCon(),
        KoLeo(weight=0.3),
        FeatureNorm(weight=0.2),
        WithinClass(weight=0.1, normalise=False),
    ),
}


def one_batch(terms: Terms) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Values and gradients by one forward of all of a step's images, all first views before all second ones."""
    loss, *regularisers = terms
    step = micro_batches(loss.views)[0]
    model = vit(loss).double().train()
    images = [normalise(batch.images, InputSpec(size=SIZE), torch.float64).chunk(loss.views) for batch in step]
    outputs = model(torch.cat([part[view] for view in range(loss.views) for part in images]))
    labels = torch.cat([batch.labels for batch in step])

    def rows(start: int, end: int) -> Outputs:
        return Outputs(*(None if part is None else part[start:end] for part in outputs))  # type: ignore[arg-type]

    total = loss(outputs, labels.repeat(loss.views))
    told = {loss.kind: float(total.detach())}
    for term in regularisers:
        n = B if term.kind == "koleo" and not term.gathered else len(labels)  # samples that it sees at a time
        starts = range(0, loss.views * len(labels), n)
        values = [term(rows(start, start + n), labels[start % len(labels) :][:n]) for start in starts]
        mean = torch.stack(values).mean()
        told[term.kind] = float(mean.detach())
        total = total + term.weight * mean
    total.backward()
    lone = {"supcon": 2 - loss.views, "within_class": loss.views}  # another view is company for SupCon
    told |= {f"{kind}_left_out": count for kind, count in lone.items() if kind in told}
    told = {f"train/{name}": value for name, value in told.items() if len(told) > 1}
    return {"train/loss": float(total.detach()), **told}, {name: p.grad for name, p in model.named_parameters()}


def each_case(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {"gather": gathered_gradient(world)}
    for name, (terms, micros, mix) in CURVES.items():
        if micros % world.size == 0:
            found[name] = trained(world, resnet(terms[0]), terms, micros, mix=mix)
    return found | {name: trained(world, vit(terms[0]), terms, MICROS, steps=1) for name, terms in OBJECTIVES.items()}


@lru_cache
def over_ranks(size: int) -> list[Any]:
    return run_ranks(each_case, size)


@pytest.mark.parametrize("size", SIZES)
def test_gather_returns_all_rows_and_sums_their_gradients(size: int) -> None:
    everything = torch.cat([torch.arange(6, dtype=torch.float64).view(3, 2) + 10 * r for r in range(size)])
    weight = size * (size + 1) / 2  # every rank used every row, rank r with weight r + 1
    for rank, found in enumerate(over_ranks(size)):
        rows, gradient = found["gather"]
        assert torch.equal(rows, everything)
        assert torch.equal(gradient, 2 * weight * everything[3 * rank : 3 * rank + 3])


@pytest.mark.parametrize(
    ("case", "size"),
    [
        *((case, 2) for case in CURVES),
        *(pytest.param(case, 4, marks=pytest.mark.slow) for case, curve in CURVES.items() if curve[1] == 4),
    ],
)
def test_loss_gradients_weights_and_batch_norm_do_not_know_the_world_size(case: str, size: int) -> None:
    terms, micros, mix = CURVES[case]
    found = [rank[case] for rank in over_ranks(size)]
    assert_same(found[0], trained(World(), resnet(terms[0]), terms, micros, mix=mix))
    for other in found[1:]:
        for name, value in found[0]["state"].items():
            assert torch.equal(value, other["state"][name]), f"{name} differs by rank"


@pytest.mark.parametrize("size", [1, *SIZES])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gathered_and_accumulated_terms_have_the_gradient_of_one_process_and_one_batch(name: str, size: int) -> None:
    """Of one forward of the whole batch; here four micro-batches, on one rank, two and four."""
    terms = OBJECTIVES[name]
    expected, gradients = one_batch(terms)
    alone = [trained(World(), vit(terms[0]), terms, MICROS, steps=1)] if size == 1 else []
    for found in alone or [rank[name] for rank in over_ranks(size)]:
        told = {key: value for key, value in found["told"][0].items() if key not in OTHER}
        assert told == pytest.approx(expected, rel=1e-9)
        assert_close(found["gradients"], gradients)


def test_supcon_of_micro_batches_is_that_of_the_whole_batch() -> None:
    """Cached embeddings: two micro-batches of 6 against one direct loss over both, through the same BatchNorm."""
    expected = trained(World(), resnet(SupCon()), (SupCon(),), 2)
    model = resnet(SupCon()).double()
    first = micro_batches(2)[0][:2]
    images = [normalise(batch.images, InputSpec(size=SIZE), torch.float64) for batch in first]
    embeddings = torch.cat([model(x).embedding_BE for x in images])
    loss = SupCon()(Outputs(embeddings, embeddings, None), torch.cat([batch.labels.repeat(2) for batch in first]))
    loss.backward()
    assert loss.item() == pytest.approx(expected["told"][0]["train/loss"], rel=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected["gradients"][name], rtol=1e-9, atol=1e-12, msg=name)
