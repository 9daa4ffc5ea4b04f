"""Moving averages: the formula, the swap that loses no bit, and going on from what was saved."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nc_dist.backbones import SmallResNetSpec
from nc_dist.engine import TorchSpec
from nc_dist.engine.ema import Average
from nc_dist.engine.torch_engine import TorchEngine
from nc_dist.model import Model, ModelSpec
from nc_dist.optim import SGD
from nc_dist.world import World


def tensors() -> list[Tensor]:
    return [torch.zeros(2, dtype=torch.float64), torch.full((1, 3), 5.0)]


@torch.no_grad()
def moved(values: list[Tensor], step: int) -> None:
    for value in values:
        value.copy_(torch.full_like(value, float(step**2)))


def test_the_average_is_the_weighted_sum_of_all_values_with_a_decay_that_grows_to_its_own() -> None:
    values = tensors()
    average = Average(values, decay=0.5)
    expected = [value.clone() for value in values]
    for n in range(12):
        moved(values, n)
        average.update()
        d = min(0.5, (1 + n) / (10 + n))
        expected = [d * old + (1 - d) * new for old, new in zip(expected, values, strict=True)]
    assert (1 + 0) / (10 + 0) < 0.5 < (1 + 11) / (10 + 11), "both rules had their turn"
    for found, wanted in zip(average.kept, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_swapping_loses_no_bit_even_after_an_error() -> None:
    values = [torch.randn(100), torch.randn(3, 3)]
    average = Average(values, decay=0.9)
    moved(values, 3)
    average.update()
    weights, kept = [v.clone() for v in values], [k.clone() for k in average.kept]
    with pytest.raises(RuntimeError), average.swapped():
        assert all(v.equal(k) for v, k in zip(values, kept, strict=True))
        raise RuntimeError
    assert all(v.equal(w) for v, w in zip(values, weights, strict=True))
    assert all(v.equal(k) for v, k in zip(average.kept, kept, strict=True))


def engine(ema: float | None = 0.9, seed: int = 0) -> TorchEngine:
    torch.manual_seed(seed)
    model = Model(ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=2)), 3)
    return TorchEngine(model, TorchSpec(), SGD(lr=0.1), World(), ema)


def train(trained: TorchEngine, seeds: range) -> None:
    for seed in seeds:
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        trained.backward(trained.forward(x).logits.square().sum())
        trained.step(0.05)
        trained.average()


def averages(of: TorchEngine) -> dict[str, Tensor]:
    with of.averaged():
        return {name: value.clone() for name, value in of.module.state_dict().items()}


def test_an_engine_averages_weights_and_running_statistics_and_saves_them_bit_for_bit(tmp_path: Path) -> None:
    first = engine()
    train(first, range(3))
    first.save(tmp_path, {})
    train(first, range(3, 6))
    other = engine(seed=1)
    other.load(tmp_path)
    train(other, range(3, 6))
    found, expected = averages(other), averages(first)
    assert [name for name, value in expected.items() if not value.equal(found[name])] == []
    now = first.module.state_dict()
    still = {name for name, value in expected.items() if value.equal(now[name])}
    assert still == {name for name in now if name.endswith("num_batches_tracked")}


def test_averages_of_a_run_that_kept_none_begin_at_its_weights(tmp_path: Path) -> None:
    plain = engine(ema=None)
    train(plain, range(2))
    plain.save(tmp_path, {})
    other = engine(seed=1)
    other.load(tmp_path)
    assert all(value.equal(plain.module.state_dict()[name]) for name, value in averages(other).items())
