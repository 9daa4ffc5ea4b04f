"""Learning-rate schedules and what the specs build."""

import pytest
import torch
from torch import nn

from nc_dist.optim import SGD, AdamW, Schedule


def test_cosine_warms_up_in_a_line_and_falls_towards_zero() -> None:
    rates = [Schedule(warmup=0.1).lr(0.5, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.5) and rates[55] == pytest.approx(0.25) and 0 < rates[99] < 1e-3
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_constant_stays_at_its_peak_after_the_warm_up() -> None:
    rates = [Schedule(kind="constant", warmup=0.5).lr(2.0, step, 8) for step in range(8)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_a_run_of_one_step_trains_at_its_peak(kind: str) -> None:
    assert Schedule.model_validate({"kind": kind}).lr(0.3, 0, 1) == 0.3


def test_the_specs_build_torchs_optimisers_with_their_settings() -> None:
    params = [nn.Parameter(torch.ones(1))]
    sgd = SGD(lr=0.3, momentum=0.8, weight_decay=0.1).build(params)
    assert isinstance(sgd, torch.optim.SGD)
    assert {k: sgd.defaults[k] for k in ("lr", "momentum", "weight_decay", "nesterov")} == {
        "lr": 0.3, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True,
    }  # fmt: skip
    adam = AdamW(lr=0.3, betas=(0.8, 0.9), weight_decay=0.1).build(params)
    assert isinstance(adam, torch.optim.AdamW)
    assert {k: adam.defaults[k] for k in ("lr", "betas", "weight_decay")} == {
        "lr": 0.3, "betas": (0.8, 0.9), "weight_decay": 0.1,
    }  # fmt: skip


def test_nesterov_without_momentum_is_plain_sgd() -> None:
    assert SGD(momentum=0).build([nn.Parameter(torch.ones(1))]).defaults["nesterov"] is False
