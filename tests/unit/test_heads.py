"""Projection heads: shapes, depths, and that no head is no change."""

import pytest
import torch
from torch import nn

from nc_dist.heads import MLPHead, NoHead


def test_no_head_changes_nothing_and_has_no_parameters() -> None:
    module, dim = NoHead().build(7)
    x = torch.randn(2, 7)
    assert dim == 7 and module(x).equal(x) and not list(module.parameters())


@pytest.mark.parametrize(
    "head, widths",
    [
        (MLPHead(depth=1, output=3), [(7, 3)]),
        (MLPHead(output=3), [(7, 7), (7, 3)]),
        (MLPHead(depth=4, hidden=5, output=3), [(7, 5), (5, 5), (5, 5), (5, 3)]),
    ],
)
def test_an_mlp_head_has_its_depth_of_linear_layers_and_ends_in_one(
    head: MLPHead, widths: list[tuple[int, int]]
) -> None:
    module, dim = head.build(7)
    assert isinstance(module, nn.Sequential)
    linear = [layer for layer in module if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == widths
    assert isinstance(module[-1], nn.Linear) and len(module) == 2 * len(widths) - 1
    assert dim == 3 and module(torch.randn(2, 7)).shape == (2, 3)
