"""Engines on paper and plain torch in one process; what holds between engines is shown by the parity tests."""

from pathlib import Path

import pytest
import torch

from nc_dist.backbones import SmallResNetSpec
from nc_dist.engine import DeepSpeedSpec, TorchSpec, deepspeed_json, evaluating
from nc_dist.engine_torch import TorchEngine
from nc_dist.model import Model, ModelSpec
from nc_dist.optim import SGD
from nc_dist.world import World


def engine(clip: float = 0.0, seed: int = 0, precision: str = "fp64") -> TorchEngine:
    torch.manual_seed(seed)
    model = Model(ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=2)), 3)
    return TorchEngine(model, TorchSpec.model_validate({"precision": precision, "clip": clip}), SGD(lr=0.1), World())


def train(trained: TorchEngine, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 8, 8, generator=random, dtype=trained.input_dtype)
    trained.backward(trained.forward(x).logits_BK.square().sum())  # type: ignore[union-attr]
    trained.step(0.05)


def weights(of: TorchEngine) -> list[torch.Tensor]:
    return [value.clone() for value in of.module.state_dict().values()]


def test_the_deepspeed_configuration_says_everything_that_deepspeed_would_assume() -> None:
    spec = DeepSpeedSpec(zero=1)
    written = deepspeed_json(spec, global_batch=96, micro=8, world_size=3)
    assert written["gradient_clipping"] == 0.0  # absent would mean 1.0
    batch = [
        written[f"{key}"]
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ]
    assert batch == [96, 8, 4]
    assert written["zero_optimization"]["stage"] == 1
    assert (written["bf16"]["enabled"], written["fp16"]["enabled"]) == (False, False)
    assert deepspeed_json(DeepSpeedSpec(clip=2.5), 8, 8, 1)["gradient_clipping"] == 2.5


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
    "precision, dtype", [("fp32", torch.float32), ("fp64", torch.float64), ("bf16", torch.float32)]
)
def test_weights_have_the_precision_that_is_asked_for(precision: str, dtype: torch.dtype) -> None:
    one = engine(precision=precision)
    assert one.input_dtype == dtype and {p.dtype for p in one.trained} == {dtype}
    outputs = one.forward(torch.randn(2, 3, 8, 8, dtype=dtype))
    assert outputs.logits_BK is not None
    assert outputs.logits_BK.dtype == (torch.bfloat16 if precision == "bf16" else dtype)


def test_frozen_parameters_do_not_move() -> None:
    torch.manual_seed(0)
    model = Model(ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=2)), 3).requires_grad_(False)
    model.classifier.requires_grad_(True)  # type: ignore[union-attr]
    one = TorchEngine(model, TorchSpec(precision="fp64"), SGD(), World())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(one, seed=1)
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
