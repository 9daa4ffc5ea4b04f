"""Projection heads: layers, shapes, what is trained in them, and where NC is measured with them."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from nc_dist.backbones import SmallResNetSpec
from nc_dist.errors import InputError
from nc_dist.heads import ETFHead, HeadSpec, LinearHead, MLPHead, NoHead, TRexHead
from nc_dist.model import Model, ModelSpec, with_new_classifier

SMALL = SmallResNetSpec(name="resnet8", width=2)
KINDS: dict[str, HeadSpec] = {
    "linear": LinearHead(output=3),
    "mlp": MLPHead(output=3, batch_norm=True, normalise_input=True),
    "trex": TRexHead(hidden=5, output=3),
    "etf": ETFHead(hidden=9, output=8),
}


def layers(module: nn.Module) -> list[str]:
    assert isinstance(module, nn.Sequential)
    return [type(layer).__name__ for layer in module]


def widths(module: nn.Module) -> list[tuple[int, int, bool]]:
    """Of the linear layers: size in, size out, whether there is a bias."""
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return [(layer.in_features, layer.out_features, layer.bias is not None) for layer in linear]


def test_no_head_changes_nothing_and_has_no_parameters() -> None:
    module, dim = NoHead().build(7)
    x = torch.randn(2, 7)
    assert dim == 7 and module(x).equal(x) and not list(module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_has_the_size_that_it_says_and_the_model_is_built_of_its_name(kind: str) -> None:
    head = KINDS[kind]
    module, dim = head.build(7)
    assert dim == (8 if kind == "etf" else 3) and module(torch.randn(4, 7)).shape == (4, dim)
    assert ModelSpec.model_validate({"backbone": SMALL, "head": head.model_dump()}).head == head and head.kind == kind


def test_a_linear_head_is_one_linear_layer() -> None:
    module, _ = LinearHead(output=3).build(7)
    assert isinstance(module, nn.Linear) and widths(module) == [(7, 3, True)]


@pytest.mark.parametrize(
    "head, linear",
    [
        (MLPHead(depth=1, output=3), [(7, 3)]),
        (MLPHead(output=3), [(7, 7), (7, 3)]),
        (MLPHead(depth=4, hidden=5, output=3), [(7, 5), (5, 5), (5, 5), (5, 3)]),
    ],
)
def test_an_mlp_head_has_its_depth_of_linear_layers_and_ends_in_one(
    head: MLPHead, linear: list[tuple[int, int]]
) -> None:
    module, _ = head.build(7)
    assert layers(module) == ["Linear", "ReLU"] * (len(linear) - 1) + ["Linear"]
    assert widths(module) == [(*size, True) for size in linear]


def test_an_mlp_heads_batch_norm_stands_before_each_relu_in_place_of_the_bias() -> None:
    module, _ = MLPHead(depth=3, hidden=5, output=3, batch_norm=True).build(7)
    assert layers(module) == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert widths(module) == [(7, 5, False), (5, 5, False), (5, 3, True)]


@pytest.mark.parametrize("depth", [0, 5])
def test_an_mlp_head_has_one_to_four_layers(depth: int) -> None:
    with pytest.raises(ValidationError, match="depth"):
        MLPHead(depth=depth)


def test_the_trex_projector_has_the_published_layers_sizes_and_start() -> None:
    """3 hidden layers of 2048 (linear with bias, BatchNorm, GELU), a bottleneck of 256 without bias."""
    module, dim = TRexHead().build(512)
    assert dim == 256 and layers(module) == ["Normalise", *["Linear", "BatchNorm1d", "GELU"] * 3, "Linear"]
    assert widths(module) == [(512, 2048, True), (2048, 2048, True), (2048, 2048, True), (2048, 256, False)]
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
            assert layer.bias is None or not layer.bias.any()
    small, _ = TRexHead(hidden_layers=1, normalise_input=False).build(512)
    assert layers(small) == ["Linear", "BatchNorm1d", "GELU", "Linear"]


@pytest.mark.parametrize("head", [MLPHead(normalise_input=True), TRexHead(hidden=5)])
def test_normalised_input_makes_a_head_blind_to_the_length_of_features(head: MLPHead | TRexHead) -> None:
    module, x, lengths = head.build(7)[0].eval(), torch.randn(4, 7), torch.tensor([[5.0], [1], [0.1], [2]])
    torch.testing.assert_close(module(x), module(lengths * x))
    other = head.model_copy(update={"normalise_input": False}).build(7)[0].eval()
    assert not torch.allclose(other(x), other(lengths * x))


def by_hand(features_Bd: Tensor, hidden: int, output: int) -> Tensor:
    """The ETF projector, entry by entry."""

    def times(rows_BD: Tensor, size: int) -> Tensor:
        factor, share = (output / (output - 1)) ** 0.5, 1 / output
        columns = [rows_BD[:, i] if i < rows_BD.shape[1] else torch.zeros(len(rows_BD)) for i in range(size)]
        return torch.stack([factor * (column - share * rows_BD.sum(1)) for column in columns], 1)

    projected_BE = times(times(features_Bd, hidden).clamp(min=0), output)
    return projected_BE / projected_BE.square().sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize("dim, hidden, output", [(4, 4, 4), (3, 9, 5), (4, 5, 6), (4, 16, 8)])
def test_the_etf_projector_is_two_fixed_etf_layers_and_a_unit_length(dim: int, hidden: int, output: int) -> None:
    module, size = ETFHead(hidden=hidden, output=output).build(dim)
    x = torch.rand(6, dim)
    torch.testing.assert_close(module(x), by_hand(x, hidden, output))
    assert size == output and module(x).norm(dim=1).allclose(torch.ones(6))


@pytest.mark.parametrize("key", ["hidden", "output"])
def test_an_etf_projector_narrower_than_the_features_is_refused(key: str) -> None:
    ETFHead(hidden=7, output=7).build(7)
    with pytest.raises(InputError, match=f"model.head.{key}=6: an etf head of 7 features .* set 7 or more"):
        ETFHead.model_validate({"hidden": 7, "output": 7, key: 6}).build(7)


def test_a_square_layer_of_the_etf_projector_is_a_simplex_etf() -> None:
    weight = ETFHead(hidden=5, output=5).build(5)[0].second
    assert isinstance(weight, Tensor)
    torch.testing.assert_close(weight @ weight.T, 5 / 4 * (torch.eye(5) - 1 / 5))


def test_the_etf_projector_is_saved_never_trained_and_passes_gradients_on() -> None:
    module, _ = ETFHead(hidden=9, output=7).build(7)
    x = torch.rand(2, 7, requires_grad=True)
    module(x)[:, 0].sum().backward()
    assert not list(module.parameters()) and list(module.state_dict()) == ["first", "second"]
    assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize("head", [NoHead(), *KINDS.values()])
def test_features_and_embedding_are_one_tensor_exactly_without_a_head(head: HeadSpec) -> None:
    model = Model(ModelSpec(backbone=SMALL, head=head), 3)
    outputs = model(torch.randn(4, 3, 8, 8))
    assert (outputs.embedding_BE is outputs.features_Bd) == model.headless == isinstance(head, NoHead)


@pytest.mark.parametrize("kind", KINDS)
def test_transfer_drops_the_head_with_all_that_it_keeps(kind: str) -> None:
    source = Model(ModelSpec(backbone=SMALL, head=KINDS[kind]), 3)
    moved = with_new_classifier(source, 4)
    assert moved.headless and not list(moved.head.state_dict()) and moved.embedding_dim == source.dim == 8
