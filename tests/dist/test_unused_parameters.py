"""A net with parameters that do nothing is refused by name where processes would wait for their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import nn

from nc_dist.backbones import SmallResNetSpec
from nc_dist.engine import TorchSpec
from nc_dist.engine.torch_engine import TorchEngine
from nc_dist.errors import InputError
from nc_dist.model import Model, ModelSpec
from nc_dist.optim import SGD

pytestmark = pytest.mark.slow


def forward(world: Any) -> str:
    model = Model(ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=2)), 3)
    model.backbone.net.idle = nn.Linear(2, 2)
    engine = TorchEngine(model, TorchSpec(), SGD(), world)
    try:
        engine.forward(torch.zeros(2, 3, 8, 8))
    except InputError as error:
        return str(error)
    return ""


def test_parameters_that_do_nothing_are_named_before_the_first_step() -> None:
    for said in run_ranks(forward, 2):
        assert "backbone.net.idle.weight" in said and "freeze them" in said
