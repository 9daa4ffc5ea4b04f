"""Learning-rate schedules, what the specs build, LARS, and the groups that parameters are put into."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from timm.optim.lars import Lars
from torch import nn
from torch.optim import lr_scheduler
from torchvision.models.vision_transformer import VisionTransformer

from nc_dist import finetune, pretrain_check
from nc_dist.backbones import SmallResNetSpec, from_vit
from nc_dist.config import FinetuneRun, PretrainRun
from nc_dist.data.augment import InputSpec
from nc_dist.engine import DeepSpeedSpec, TorchSpec
from nc_dist.engine.checks import check_optim
from nc_dist.engine.torch_engine import TorchEngine
from nc_dist.errors import InputError
from nc_dist.heads import MLPHead
from nc_dist.methods import LayerFT
from nc_dist.model import Model, ModelSpec, export
from nc_dist.optim import LARS, SGD, AdamW, OptimSpec, Schedule, parameter_groups
from nc_dist.optim.groups import depths
from nc_dist.spec import load, override, validate
from nc_dist.world import World


def rates(steps: int, peak: float = 1.0, **spec: Any) -> list[float]:
    schedule = Schedule.model_validate(spec)
    return [schedule.lr(peak, step, steps) for step in range(steps)]


def torchs(scheduler: Any, peak: float, steps: int, **settings: Any) -> list[float]:
    """The learning rates of one of torch's schedulers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], peak)
    schedule, found = scheduler(optimizer, **settings), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("kind", ["cosine", "linear", "step", "constant"])
def test_every_course_warms_up_in_a_line_as_torchs_does(kind: str) -> None:
    found = rates(100, 0.5, kind=kind, warmup=0.1)
    assert found[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert found[:10] == pytest.approx(torchs(lr_scheduler.LinearLR, 0.5, 10, start_factor=0.1, total_iters=9))
    assert found[10] == 0.5 and rates(100, 0.5, kind=kind, warmup=0)[0] == 0.5


@pytest.mark.parametrize("end", [0, 0.1])
def test_after_the_warm_up_a_cosine_is_torchs(end: float) -> None:
    found = rates(100, 0.5, warmup=0.1, end=end)
    assert found[10:] == pytest.approx(torchs(lr_scheduler.CosineAnnealingLR, 0.5, 90, T_max=90, eta_min=0.5 * end))
    assert found[55] == pytest.approx(0.5 * (1 + end) / 2)


@pytest.mark.parametrize("end", [0, 0.1])
def test_after_the_warm_up_a_line_is_torchs(end: float) -> None:
    expected = torchs(lr_scheduler.LinearLR, 0.5, 90, start_factor=1, end_factor=end, total_iters=90)
    assert rates(100, 0.5, kind="linear", warmup=0.1, end=end)[10:] == pytest.approx(expected)


def test_steps_are_taken_at_fractions_of_the_whole_run() -> None:
    expected = torchs(lr_scheduler.MultiStepLR, 0.5, 90, milestones=[30, 60, 80], gamma=0.1)
    assert rates(90, 0.5, kind="step", warmup=0) == pytest.approx(expected)  # ImageNet's 30, 60 and 80 of 90 epochs
    found = rates(10, kind="step", warmup=0.2, milestones=[0.5, 0.8], gamma=0.5)
    assert found == [0.5, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_constant_stays_at_its_peak_after_the_warm_up() -> None:
    assert rates(8, 2.0, kind="constant", warmup=0.5) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_a_run_of_one_step_trains_at_its_peak(kind: str) -> None:
    assert Schedule.model_validate({"kind": kind}).lr(0.3, 0, 1) == 0.3


@pytest.mark.parametrize(
    "spec, error",
    [
        ({"kind": "constant", "end": 0.1}, "end=0.1: kind=constant has no such key, it is one of cosine and linear"),
        ({"gamma": 0.5}, "gamma=0.5: kind=cosine has no such key, it is one of step"),
        ({"kind": "linear", "milestones": [0.5]}, "milestones=.*: kind=linear has no such key"),
        ({"kind": "step", "milestones": [0.5, 0.5]}, "they must ascend"),
        ({"kind": "step", "milestones": []}, "the first one must come after warmup"),
        ({"kind": "step", "milestones": [0.1], "warmup": 0.1}, "the first one must come after warmup=0.1"),
        ({"kind": "step", "milestones": [30, 60]}, "less than 1"),
    ],
)
def test_a_schedule_refuses_what_its_kind_would_not_follow(spec: dict[str, Any], error: str) -> None:
    with pytest.raises(ValidationError, match=error):
        Schedule.model_validate(spec)


@pytest.mark.parametrize("kind", ["cosine", "linear", "step", "constant"])
def test_a_schedule_with_all_its_keys_written_out_is_the_same(kind: str) -> None:
    schedule = Schedule.model_validate({"kind": kind})
    assert Schedule.model_validate(schedule.model_dump(mode="json")) == schedule


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random, dtype=dtype)) for shape in shapes]


def one_group(params: list[nn.Parameter], optim: OptimSpec) -> list[dict[str, Any]]:
    return [{"params": params, "weight_decay": optim.weight_decay, "lr_scale": 1.0}]


def test_the_specs_build_torchs_optimisers_with_their_settings() -> None:
    sgd = SGD(lr=0.3, momentum=0.8, weight_decay=0.1)
    built: torch.optim.Optimizer = sgd.build(one_group(parameters((1,)), sgd))
    assert isinstance(built, torch.optim.SGD)
    assert {k: built.param_groups[0][k] for k in ("lr", "momentum", "weight_decay", "nesterov", "lr_scale")} == {
        "lr": 0.3, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True, "lr_scale": 1.0,
    }  # fmt: skip
    adam = AdamW(lr=0.3, betas=(0.8, 0.9), weight_decay=0.1)
    built = adam.build(one_group(parameters((1,)), adam))
    assert isinstance(built, torch.optim.AdamW)
    assert {k: built.param_groups[0][k] for k in ("lr", "betas", "weight_decay", "lr_scale")} == {
        "lr": 0.3, "betas": (0.8, 0.9), "weight_decay": 0.1, "lr_scale": 1.0,
    }  # fmt: skip


def test_nesterov_without_momentum_is_plain_sgd() -> None:
    sgd = SGD(momentum=0)
    assert sgd.build(one_group(parameters((1,)), sgd)).defaults["nesterov"] is False


GRADIENTS = np.random.default_rng(1).standard_normal((5, 12))


def lars_in_numpy(
    weight: np.ndarray, gradients: np.ndarray, lrs: list[float], momentum: float, decay: float, trust: float
) -> np.ndarray:
    """Algorithm 1 of arXiv 1708.03888, literally; vectors are not adapted, nor is what is zero."""
    velocity = np.zeros_like(weight)
    for gradient, lr in zip(gradients, lrs, strict=True):
        length = math.sqrt((weight**2).sum())
        steepness = math.sqrt((gradient**2).sum())
        local = trust * length / (steepness + decay * length) if weight.ndim > 1 and length * steepness > 0 else 1.0
        velocity = momentum * velocity + lr * local * (gradient + decay * weight)
        weight = weight - velocity
    return weight


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2, 1), (12,)], ids=["matrix", "convolution", "bias"])
@pytest.mark.parametrize("start", ["drawn", "zero"])
def test_lars_follows_its_paper_while_the_learning_rate_changes(shape: tuple[int, ...], start: str) -> None:
    optim = LARS(lr=1, momentum=0.8, weight_decay=0.1, trust=0.02)
    [parameter] = parameters(shape)
    if start == "zero":
        parameter.data.zero_()
    gradients, lrs = GRADIENTS.reshape(5, *shape).copy(), [1.0, 3.0, 2.0, 0.5, 4.0]
    gradients[3] = 0
    expected = lars_in_numpy(parameter.detach().numpy().copy(), gradients, lrs, 0.8, 0.1, 0.02)
    optimizer = optim.build(one_group([parameter], optim))
    for gradient, lr in zip(gradients, lrs, strict=True):
        parameter.grad = torch.tensor(gradient)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert parameter.grad.equal(torch.tensor(gradient)), "the gradient is not its to change"
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)


def test_lars_is_timms_while_the_learning_rate_stands_still() -> None:
    ours, theirs = (parameters((3, 4)) for _ in range(2))
    optim = LARS(lr=2, momentum=0.9, weight_decay=0.1, trust=0.01)
    optimizers = (
        optim.build(one_group(ours, optim)),
        Lars(theirs, lr=2, momentum=0.9, weight_decay=0.1, trust_coeff=0.01, eps=0),
    )
    for gradient in GRADIENTS:
        for [parameter], optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.tensor(gradient.reshape(3, 4))
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_lars_goes_on_from_its_saved_state_and_leaves_what_has_no_gradient() -> None:
    optim = LARS(trust=0.1)
    first, idle = parameters((3, 4), (3, 4))
    before, optimizer = idle.detach().clone(), optim.build(one_group([first, idle], optim))
    for i, gradient in enumerate(GRADIENTS):
        if i == 3:
            saved = optimizer.state_dict()
            optimizer = optim.build(one_group([first, idle], optim))
            optimizer.load_state_dict(saved)
        first.grad = torch.tensor(gradient.reshape(3, 4))
        optimizer.step()
    expected = lars_in_numpy(
        parameters((3, 4))[0].detach().numpy(), GRADIENTS.reshape(5, 3, 4), [2.0] * 5, 0.9, 1e-4, 0.1
    )
    np.testing.assert_allclose(first.detach().numpy(), expected, rtol=1e-12)
    assert idle.equal(before)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_lars_is_refused_where_parameters_are_flattened(zero: int) -> None:
    engine = DeepSpeedSpec.model_validate({"zero": zero})
    with pytest.raises(InputError, match=f"optim.kind='lars': not with engine.zero={zero}.*use engine.zero=0"):
        check_optim(LARS(), engine)
    for optim, other in ((LARS(), TorchSpec()), (LARS(), DeepSpeedSpec(zero=0)), (SGD(), engine), (AdamW(), engine)):
        check_optim(optim, other)


def test_both_journeys_ask_whether_optimiser_and_engine_fit(tmp_path: Path) -> None:
    settings = ["optim.kind=lars", "engine.kind=deepspeed", "engine.zero=1"]
    with pytest.raises(InputError, match="optim.kind='lars'"):
        pretrain_check.check(load(PretrainRun, Path(__file__).parents[1] / "small.yaml", settings), 1)
    export(resnet(), tmp_path / "export", InputSpec(size=8), [], {})
    tree = {"out": "x", "source": str(tmp_path), "data": {"train": "digits:train"}, "method": {"kind": "full"}}
    with pytest.raises(InputError, match="optim.kind='lars'"):
        finetune.check(validate(FinetuneRun, override(tree, settings), "run.yaml"), 1)


def resnet(**more: Any) -> Model:
    return Model(ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=2), head=MLPHead(output=4)), 3, **more)


def vit() -> Model:
    net = VisionTransformer(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8)
    net.heads = nn.Identity()
    return Model(ModelSpec(backbone=SmallResNetSpec(name="resnet8")), 3, backbone=from_vit(net))


def depth_of(model: Model) -> dict[str, int]:
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, depths(names, model.block_prefixes), strict=True))


def starts(name: str, *prefixes: str) -> bool:
    return name.startswith(tuple(f"backbone.net.{prefix}" for prefix in prefixes))


def test_a_resnets_depths_are_stem_blocks_and_what_follows() -> None:
    for name, depth in depth_of(resnet()).items():
        expected = [starts(name, "conv1", "bn1"), *(starts(name, f"layer{i}.0.") for i in (1, 2, 3))]
        assert depth == (expected.index(True) if True in expected else 4), name
        assert (depth == 4) == name.startswith(("head.", "classifier.")), name


def test_a_transformers_token_and_positions_are_stem_and_its_last_norm_comes_last() -> None:
    found = depth_of(vit())
    for name, depth in found.items():
        stem = starts(name, "class_token", "conv_proj.", "encoder.pos_embedding")
        layer = [starts(name, f"encoder.layers.encoder_layer_{i}.") for i in (0, 1)]
        assert depth == (0 if stem else layer.index(True) + 1 if True in layer else 3), name
    assert found["backbone.net.encoder.ln.weight"] == found["classifier.bias"] == 3
    assert found["backbone.net.class_token"] == found["backbone.net.encoder.pos_embedding"] == 0


@pytest.mark.parametrize(
    "names, blocks, expected",
    [
        (["s", "a.w", "between", "b.w", "b.x", "end"], ["a", "b"], [0, 1, 1, 2, 2, 3]),
        (["a1.w", "a10.w", "a.w"], ["a1", "a10"], [1, 2, 3]),  # a name is no prefix of a longer one
        (["w"], [], [1]),
    ],
)
def test_depths_of_names_in_and_around_blocks(names: list[str], blocks: list[str], expected: list[int]) -> None:
    assert depths(names, blocks) == expected


@pytest.mark.parametrize(
    "make", [resnet, vit, lambda: LayerFT().apply(resnet(), 4, 0)], ids=["resnet", "vit", "frozen"]
)
@pytest.mark.parametrize("decay", [0.1, 0.0])
@pytest.mark.parametrize("optim", [SGD, AdamW, LARS])
def test_no_parameter_is_lost_or_doubled_and_each_has_its_decay_and_scale(make: Any, decay: float, optim: Any) -> None:
    model = make()
    groups = parameter_groups(
        model, model.block_prefixes, optim(layer_decay=0.5, decay_norm_and_bias=False, weight_decay=decay)
    )
    found = {id(p): (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    depth, last = depth_of(model), len(model.blocks) + 1
    for name, p in model.named_parameters():
        if p.requires_grad:
            spared = p.ndim == 1 or name.endswith(("class_token", "pos_embedding"))
            assert found[id(p)] == (0 if spared else decay, 0.5 ** (last - depth[name])), name
    assert len(groups) == len(set(found.values()))


@pytest.mark.parametrize("make", [resnet, vit])
def test_one_group_in_the_models_order_where_nothing_is_asked_for(make: Any) -> None:
    model = make()
    [group] = parameter_groups(model, model.block_prefixes, SGD(weight_decay=0.1))
    assert group["weight_decay"] == 0.1 and group["lr_scale"] == 1
    assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))


def test_an_engine_moves_each_depth_at_its_own_rate_whatever_the_schedule() -> None:
    """Plain SGD: a parameter moves by lr * 0.5 ** (blocks after it, and one more) times its gradient."""
    torch.manual_seed(0)
    model = resnet()
    optim = SGD(momentum=0, weight_decay=0, layer_decay=0.5)
    engine = TorchEngine(model, TorchSpec(precision="fp64"), optim, World())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for lr in (0.1, 0.3):
        engine.backward(engine.forward(torch.randn(4, 3, 8, 8, dtype=torch.float64)).logits.square().mean())
        for name, p in model.named_parameters():
            assert p.grad is not None
            before[name] -= lr * 0.5 ** (4 - depth_of(model)[name]) * p.grad
        assert engine.step(lr)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), before[name], rtol=1e-12, atol=1e-15, msg=name)
