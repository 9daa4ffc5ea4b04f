"""What a model takes, found without memory, is what published tables and real forwards say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from nc_dist.backbones import SmallResNetSpec
from nc_dist.data.augment import InputSpec
from nc_dist.heads import ETFClassifier, MLPHead
from nc_dist.model import Model, ModelSpec
from nc_dist.optim import LARS, SGD, AdamW
from nc_dist.plan.model_cost import model_cost, optimizer_bytes

SMALL, INPUT, IMAGES = ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=8)), InputSpec(size=16), 6


def torchvision_model(name: str) -> ModelSpec:
    return ModelSpec.model_validate({"backbone": {"kind": "torchvision", "name": name}})


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16"])
def test_parameters_and_flops_are_those_that_torchvision_publishes(name: str) -> None:
    """Its tables count a multiply-add as one operation."""
    cost = model_cost(torchvision_model(name), 1000, InputSpec(size=224), 2)
    published = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].meta
    assert cost.parameters == published["num_params"]
    assert cost.flops / 2e9 == pytest.approx(published["_ops"], abs=2e-3)
    assert cost.attention == name.startswith("vit")


def saved_bytes(forward: Callable[[], object], model: Model) -> int:
    """Storages that autograd keeps of a real forward, parameters and buffers of the model left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for address, storage in found.items() if address not in own)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_activations_are_what_a_real_forward_keeps(precision: str) -> None:
    spec = SMALL.model_copy(update={"head": MLPHead(depth=2, output=16)})
    dtype = torch.float64 if precision == "fp64" else torch.float32
    cost = model_cost(spec, 10, INPUT, IMAGES, precision)
    model = Model(spec, 10).to(dtype)
    x = torch.randn(IMAGES, 3, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
    assert cost.activations == pytest.approx(saved_bytes(lambda: model(x), model), rel=0.01)
    assert cost.buffers == sum(b.numel() * b.element_size() for b in model.buffers())


def test_activations_grow_with_the_images_and_half_precision_halves_them() -> None:
    one, three = (model_cost(SMALL, 10, INPUT, images).activations for images in (16, 48))
    assert three == pytest.approx(3 * one, rel=0.01)
    assert model_cost(SMALL, 10, INPUT, 48, "bf16").activations == pytest.approx(three / 2, rel=0.1)


class Recomputed(nn.Module):
    """A block whose activations are not kept."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, z, use_reentrant=False)  # type: ignore[no-any-return]


def test_with_recompute_the_blocks_keep_their_inputs_and_one_of_them_is_there_at_a_time() -> None:
    cost = model_cost(SMALL, 10, INPUT, IMAGES)
    model = Model(SMALL, 10)
    x = torch.randn(IMAGES, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    entering = [model.prefix(x, block.name).detach().requires_grad_() for block in model.blocks]
    by_block = [saved_bytes(partial(model.backbone.run, i, z), model) for i, z in enumerate(entering)]
    for block in model.blocks:
        parent, _, name = block.name.rpartition(".")
        setattr(
            model.backbone.net.get_submodule(parent), name, Recomputed(model.backbone.net.get_submodule(block.name))
        )
    really = saved_bytes(lambda: model(x), model) + max(by_block)
    assert really <= cost.recomputed <= 1.25 * really  # inputs that are kept anyway count twice
    assert cost.recomputed < cost.activations


def test_what_is_not_trained_is_told_apart() -> None:
    fixed = model_cost(SMALL.model_copy(update={"classifier": ETFClassifier()}), 10, INPUT, 2)
    free = model_cost(SMALL, 10, INPUT, 2)
    assert sum(free.trained) - sum(fixed.trained) == 10 * 32 + 10 and fixed.buffers - free.buffers == 4 * 10 * 32
    assert model_cost(SMALL, 0, INPUT, 2).parameters == free.parameters - (10 * 32 + 10)


def test_published_weights_are_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    tree = {"backbone": {"kind": "torchvision", "name": "resnet18", "weights": "DEFAULT"}}
    assert model_cost(ModelSpec.model_validate(tree), 0, InputSpec(size=64), 2).parameters == 11_176_512
    assert list(tmp_path.iterdir()) == []


class Own(nn.Module):
    """A user's net of one convolution and something that fake tensors cannot follow."""

    def __init__(self, odd: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.odd = nn.Conv2d(3, 5, 3), odd

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(self.conv(x).mean((2, 3)))


def looks_at_values() -> nn.Module:
    return Own(lambda z: z * (1 if z.sum().item() > 0 else 2))


def holds_a_plain_tensor() -> nn.Module:
    plain = torch.ones(5)
    return Own(lambda z: z * plain)


def has_shapes_of_values() -> nn.Module:
    return Own(lambda z: z + z[z > 0].sum())


ODD = {
    "looks_at_values": "DataDependentOutput",
    "holds_a_plain_tensor": "Tensor",
    "has_shapes_of_values": "DynamicOutputShape",
}


@pytest.mark.parametrize(("function", "reason"), ODD.items())
def test_of_a_net_that_cannot_be_traced_the_size_is_known_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, function: str, reason: str
) -> None:
    monkeypatch.setenv("NC_DIST_ALLOW_USER_CODE", "1")
    tree = {"backbone": {"kind": "own", "function": f"{__name__}:{function}"}}
    cost = model_cost(ModelSpec.model_validate(tree), 10, INPUT, IMAGES)
    assert reason in cost.untraced and "\n" not in cost.untraced
    assert cost.parameters == (3 * 9 + 1) * 5 + (5 + 1) * 10
    assert cost.flops == cost.activations == 0
    assert model_cost(SMALL, 10, INPUT, IMAGES).untraced == ""


def test_the_state_of_each_optimiser_is_counted() -> None:
    assert optimizer_bytes(SGD()) == 4 and optimizer_bytes(SGD(momentum=0)) == 0
    assert optimizer_bytes(AdamW()) == 8 and optimizer_bytes(AdamW(), element=8) == 16
    assert optimizer_bytes(LARS()) == 4
