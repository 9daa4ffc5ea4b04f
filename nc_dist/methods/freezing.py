"""What the methods share: freezing all but some modules, and the mode that frozen layers are kept in."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nc_dist.errors import InputError
from nc_dist.model import Model


def train_only(model: Model, modules: Iterable[nn.Module]) -> Model:
    """Exactly the parameters of `modules` require gradients."""
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)
    return model


def train_mode(model: nn.Module) -> None:
    """Train mode where something is trained, else eval mode: frozen BatchNorm and dropout stay as in the source."""
    _set_mode(model, True)


def _set_mode(module: nn.Module, inherited: bool) -> None:
    """A module without parameters (dropout) follows the one that holds it."""
    own = list(module.parameters())
    module.training = any(p.requires_grad for p in own) if own else inherited
    for child in module.children():
        _set_mode(child, module.training)


def default_block(model: Model) -> str:
    """`layer3.0` where a stage follows it, else the middle block: fixed, so that nobody chose it on test data."""
    names = [block.name for block in model.blocks]
    has_stage_4 = any(name.startswith("layer4") for name in names)
    return "layer3.0" if has_stage_4 else names[len(names) // 2]


def find_block(model: Model, block: str | None) -> str:
    """The block that is to be tuned; InputError lists the names there are."""
    name = default_block(model) if block is None else block
    try:
        model.backbone.index(name)
    except ValueError as error:
        raise InputError(f"method.{error}") from None
    return name


def block_module(model: Model, block: str) -> nn.Module:
    """The submodule of a block."""
    return model.backbone.module(model.backbone.index(block))


def trainable(model: nn.Module) -> tuple[int, int]:
    """(parameters that are trained, all parameters), the classifier counted in both."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, grad in counts if grad), sum(n for n, _ in counts)
