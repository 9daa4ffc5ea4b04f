"""Engines on paper and plain torch in one process; what holds between engines is shown by the parity tests."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nc_dist.backbones import SmallResNetSpec
from nc_dist.config import PretrainRun
from nc_dist.data.augment import InputSpec, normalise
from nc_dist.data.stream import Batch
from nc_dist.engine import DeepSpeedSpec, TorchSpec, deepspeed_json, evaluating
from nc_dist.engine.checks import check_engine
from nc_dist.engine.torch_engine import TorchEngine
from nc_dist.errors import InputError
from nc_dist.loop import train_steps
from nc_dist.losses import CrossEntropy
from nc_dist.model import Model, ModelSpec
from nc_dist.objective import Objective
from nc_dist.optim import SGD, Schedule
from nc_dist.pretrain_check import check
from nc_dist.world import World


def engine(clip: float = 0.0, seed: int = 0, precision: str = "fp64", **settings: Any) -> TorchEngine:
    torch.manual_seed(seed)
    model = Model(ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=2)), 3)
    spec = TorchSpec.model_validate({"precision": precision, "clip": clip, **settings})
    return TorchEngine(model, spec, SGD(lr=0.1), World())


def train(trained: TorchEngine, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 8, 8, generator=random, dtype=trained.input_dtype)
    trained.backward(trained.forward(x).logits_BK.square().sum())  # type: ignore[union-attr]
    trained.step(0.05)


def weights(of: TorchEngine) -> list[torch.Tensor]:
    return [value.clone() for value in of.module.state_dict().values()]


def test_the_deepspeed_configuration_says_everything_that_deepspeed_would_assume() -> None:
    spec = DeepSpeedSpec(zero=1)
    written = deepspeed_json(spec, global_batch=96, micro=8, world_size=3, parameters=10**6, gpu=False)
    assert written["gradient_clipping"] == 0.0  # absent would mean 1.0
    batch = [
        written[f"{key}"]
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ]
    assert batch == [96, 8, 4]
    assert written["zero_optimization"]["stage"] == 1
    assert (written["bf16"]["enabled"], written["fp16"]["enabled"]) == (False, False)
    assert deepspeed_json(DeepSpeedSpec(clip=2.5), 8, 8, 1, 10**6, False)["gradient_clipping"] == 2.5


def test_clipping_bounds_the_step_and_reports_the_norm_before_it() -> None:
    free, clipped = engine(), engine(clip=1e-3)
    start = torch.cat([p.detach().clone().flatten() for p in free.trained])
    for one in (free, clipped):
        train(one, seed=1)
    assert clipped.grad_norm == pytest.approx(free.grad_norm) and free.grad_norm > 1
    moved = torch.cat([p.detach().flatten() for p in clipped.trained]) - start
    # Nesterov's first step is (1 + momentum) times the gradient; weight decay is added after the clipping.
    decay = 5e-4 * start
    assert float((moved / (0.05 * 1.9) + decay).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_saved_engine_goes_on_bit_for_bit(tmp_path: Path) -> None:
    first = engine()
    train(first, seed=1)
    first.save(tmp_path, {"step": 1})
    train(first, seed=2)
    other = engine(seed=5)
    assert other.load(tmp_path) == {"step": 1}
    train(other, seed=2)
    assert all(a.equal(b) for a, b in zip(weights(first), weights(other), strict=True))


def test_an_eval_forward_leaves_modes_statistics_and_gradients_alone() -> None:
    one = engine()
    one.module.backbone.net.bn1.eval()  # type: ignore[union-attr]
    before, modes = weights(one), [m.training for m in one.module.modules()]
    outputs = one.eval_forward(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    assert not outputs.features_Bd.requires_grad
    assert modes == [m.training for m in one.module.modules()] and True in modes and False in modes
    assert all(a.equal(b) for a, b in zip(before, weights(one), strict=True))


def test_modes_are_put_back_after_an_error() -> None:
    module = engine().module
    with pytest.raises(RuntimeError), evaluating(module):
        assert not module.training
        raise RuntimeError
    assert module.training


@pytest.mark.parametrize(
    "precision, dtype, half",
    [
        ("fp32", torch.float32, torch.float32),
        ("fp64", torch.float64, torch.float64),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
    ],
)
def test_weights_and_outputs_have_the_precision_that_is_asked_for(
    precision: str, dtype: torch.dtype, half: torch.dtype
) -> None:
    one = engine(precision=precision)
    assert one.input_dtype == dtype and {p.dtype for p in one.trained} == {dtype}
    for forward in (one.forward, one.eval_forward):
        outputs = forward(torch.randn(2, 3, 8, 8, dtype=dtype))
        assert outputs.features_Bd.dtype == half and outputs.logits.dtype == dtype  # what losses see is not rounded


def test_fp16_keeps_gradients_that_would_vanish_and_steps_as_fp32_does() -> None:
    """A loss of 1e-7 has no gradient in half precision; scaled, the step is that of fp32."""
    moves = []
    for precision in ("fp32", "fp16"):
        one = engine(precision=precision)
        before = torch.cat([p.detach().flatten().clone() for p in one.trained])
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        one.backward(one.forward(x).logits.float().square().sum() * 1e-7)
        assert one.step(0.1) and one.grad_norm > 0
        moves.append(torch.cat([p.detach().flatten() for p in one.trained]) - before)
    assert float((moves[0] - moves[1]).norm() / moves[0].norm()) < 0.02


def test_a_step_with_gradients_that_are_not_finite_moves_nothing_and_in_fp16_halves_the_scale(tmp_path: Path) -> None:
    for precision in ("fp32", "fp16"):
        one = engine(precision=precision)
        train(one, seed=1)
        before, momentum = weights(one), [s["momentum_buffer"].clone() for s in one.optimizer.state.values()]
        scale = one.scaler.get_scale()
        one.module.classifier.weight.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[union-attr]
        x = torch.randn(4, 3, 8, 8)
        with evaluating(one.module, gradients=True):  # running statistics are the loop's matter
            one.backward(one.forward(x).logits.float().square().sum())
        assert not one.step(0.1)
        assert all(a.equal(b) for a, b in zip(before, weights(one), strict=True))
        states = one.optimizer.state.values()
        assert all(a.equal(s["momentum_buffer"]) for a, s in zip(momentum, states, strict=True))
        assert all(p.grad is None for p in one.trained)
        assert one.scaler.get_scale() == (scale / 2 if precision == "fp16" else 1)
        one.save(tmp_path, {})
        other = engine(precision=precision, seed=1)
        other.load(tmp_path)
        assert other.scaler.get_scale() == one.scaler.get_scale()


def test_images_and_weights_lie_in_memory_as_asked() -> None:
    for channels_last in (True, False):
        one = engine(channels_last=channels_last, precision="fp32")
        seen: list[torch.Tensor] = []
        conv = one.module.backbone.net.conv1
        conv.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))  # type: ignore[union-attr]
        for x in (torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)):
            one.forward(x)
            one.eval_forward(x)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert len(seen) == 4 and all(tensor.is_contiguous(memory_format=layout) for tensor in seen)
        assert conv.weight.is_contiguous(memory_format=layout)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "settings, cuda, sync, micros, message",
    [
        ({"kind": "torch", "precision": "fp16"}, False, False, 1, "engine.precision='fp16': needs a GPU"),
        ({"kind": "deepspeed", "precision": "fp16"}, False, False, 1, "engine.precision='fp16': needs a GPU"),
        ({"kind": "torch"}, False, True, 1, "batch_norm='sync': needs GPUs"),
        ({"kind": "torch"}, True, True, 2, "batch_norm='sync': each process takes 2 micro-batches"),
        ({"kind": "deepspeed", "zero": 3, "compile": True}, True, False, 1, "engine.compile=true: not with engine.zer"),
        ({"kind": "deepspeed", "zero": 0, "offload_optimizer": True}, True, False, 1, "offload_optimizer=true: not w"),
        ({"kind": "deepspeed", "zero": 2, "offload_parameters": True}, True, False, 1, "offload_parameters=true: not"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], cuda: bool, sync: bool, micros: int, message: str
) -> None:
    spec = (TorchSpec if settings["kind"] == "torch" else DeepSpeedSpec).model_validate(settings)
    with pytest.raises(InputError, match=message):
        check_engine(spec, cuda, "sync" if sync else "micro", micros)


def test_settings_that_work_are_not_refused() -> None:
    check_engine(TorchSpec(precision="fp16", compile=True), True, "sync", 1)
    check_engine(TorchSpec(precision="bf16", compile=True), False, "micro", 4)
    check_engine(DeepSpeedSpec(zero=3, offload_optimizer=True, offload_parameters=True), False)
    check_engine(DeepSpeedSpec(zero=2, compile=True, offload_optimizer=True), False)


def test_frozen_parameters_do_not_move() -> None:
    torch.manual_seed(0)
    model = Model(ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=2)), 3).requires_grad_(False)
    model.classifier.requires_grad_(True)  # type: ignore[union-attr]
    one = TorchEngine(model, TorchSpec(precision="fp64"), SGD(), World())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(one, seed=1)
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one_does_and_keeps_its_names() -> None:
    """A C++ compiler is needed. Shapes, modes and momentum as in a journey: the loop trains, a probe looks."""
    losses, names = [], []
    for settings in ({}, {"compile": True, "recompute": True}):
        one = engine(precision="fp32", **settings)
        random = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (4, 8, 3, 8, 8), dtype=torch.uint8, generator=random)
        batches = [[Batch(each, torch.arange(8) % 3, torch.arange(8))] for each in images]
        objective = Objective(CrossEntropy(), InputSpec(size=8), 1, 0, 0.1, Schedule(warmup=0), 4)
        losses.append([step.metrics()["train/loss"] for step in train_steps(one, batches, objective, World())])
        losses[-1].append(float(one.eval_forward(normalise(images[0], InputSpec(size=8))).logits.sum()))
        names.append(list(one.module.state_dict()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(set(losses[0])) == 5
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"engine": {"kind": "torch", "precision": "fp16"}}, "engine.precision='fp16'"),
        ({"engine": {"kind": "torch"}, "batch_norm": "sync"}, "batch_norm='sync'"),
        ({"engine": {"kind": "deepspeed", "zero": 3, "compile": True}}, "engine.compile=true"),
        ({"engine": {"kind": "deepspeed", "zero": 1, "offload_parameters": True}}, "engine.offload_parameters=true"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU refuses")
def test_a_run_is_refused_before_it_starts(tree: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    run = PretrainRun.model_validate({**tree, "input": {"size": 8}, **changes})
    with pytest.raises(InputError, match=message):
        check(run, 1)
