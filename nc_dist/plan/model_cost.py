"""What a model takes: parameters; FLOPs and activations, found on fake tensors. For plans and MFU.

The tensors pretend to lie on a GPU, so that autocast and attention choose what they choose there; none has memory. Nets
that look at values, or keep plain tensors as attributes, cannot be followed so: then FLOPs and activations are unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from nc_dist.data.augment import InputSpec
from nc_dist.engine import DTYPES, HALF
from nc_dist.model import Model, ModelSpec
from nc_dist.optim import OptimSpec

PRETENDED = "cuda"


@dataclass(frozen=True)
class ModelSize:
    """Of one model."""

    trained: tuple[int, ...]  # elements of each trained parameter
    frozen: int  # elements of parameters that are not trained
    buffers: int  # bytes

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(self.trained) + self.frozen


@dataclass(frozen=True)
class ModelCost(ModelSize):
    """Of one model and one micro-batch."""

    flops: int  # of the forward of one image: matrix products and convolutions, a multiply-add is two
    activations: int  # bytes that the forward of a micro-batch keeps for its backward
    recomputed: int  # bytes at most, where blocks keep nothing and are computed again in the backward
    attention: bool  # a transformer, not a convolutional net
    untraced: str = ""  # why the net cannot be traced: the three numbers are 0 then, and unknown


def element_size(precision: str) -> int:
    """Bytes of one weight; half precisions are of the forward alone."""
    return DTYPES.get(precision, torch.float32).itemsize


def model_size(spec: ModelSpec, num_classes: int, precision: str = "fp32") -> ModelSize:
    """Of the model as it would be trained, built without memory where its family allows that."""
    return _size(_built(spec, num_classes, precision))


def model_cost(spec: ModelSpec, num_classes: int, input: InputSpec, images: int, precision: str = "fp32") -> ModelCost:
    """Build the model without memory and send `images` images of the input's size through it.

    FLOPs are those that torch.utils.flop_counter knows. Activations are the storages that autograd saves, each counted
    once, parameters and buffers left out; under autocast the half-precision copies of weights are among them.
    """
    model = _built(spec, num_classes, precision)
    size = _size(model)
    attends = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    attention = attends or any(block.pooling == "cls" for block in model.blocks)
    traced, untraced = (0, 0, 0), ""
    try:
        traced = _traced(model, input, images, precision)
    except Exception as error:  # of any kind: what the net does is not ours
        untraced = _reason(error)
    return ModelCost(size.trained, size.frozen, size.buffers, *traced, attention, untraced)


def _built(spec: ModelSpec, num_classes: int, precision: str) -> Model:
    with torch.device(spec.backbone.checked_on):
        return Model(spec, num_classes).to(DTYPES.get(precision, torch.float32))


def _size(model: Model) -> ModelSize:
    parameters = list(model.parameters())
    return ModelSize(
        trained=tuple(p.numel() for p in parameters if p.requires_grad),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
    )


def _traced(model: Model, input: InputSpec, images: int, precision: str) -> tuple[int, int, int]:
    """FLOPs, activations, recomputed; any error of the net itself on fake tensors is raised."""
    named = [*model.named_parameters(), *model.named_buffers()]
    with FakeTensorMode():
        # Not from the meta tensors themselves: initialisers of some nets look at values, which fake tensors lack.
        fakes = {name: _fake(tensor) for name, tensor in named}
        dtype = DTYPES.get(precision, torch.float32)
        x = torch.zeros(images, 3, input.size, input.size, dtype=dtype, device=PRETENDED)
        kept = _Kept(list(fakes.values()))
        with FlopCounterMode(display=False) as counter, kept.of_blocks(model), _autocast(HALF.get(precision)):
            functional_call(model, fakes, (x.contiguous(memory_format=torch.channels_last),))
        return counter.get_total_flops() // images, kept.total, kept.with_recompute


def _reason(error: Exception) -> str:
    """The kind of the error and the first line that it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:150]}" if said else type(error).__name__


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=PRETENDED)
    return fake.requires_grad_(tensor.requires_grad)


class _Kept:
    """Counts what autograd keeps: in all, in each block of the model, and the blocks' inputs."""

    def __init__(self, not_counted: list[Tensor]) -> None:
        self._storages: dict[int, Any] = {t.untyped_storage()._cdata: t for t in not_counted}  # alive, or ids recur
        self.total = 0
        self._before_block = 0
        self._blocks: list[int] = []
        self._inputs = 0

    def add(self, tensor: Tensor) -> Tensor:
        """What autograd saves."""
        self.total += self._new_bytes(tensor)
        return tensor

    def _new_bytes(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return 0
        self._storages[storage._cdata] = storage
        return storage.nbytes()

    @contextmanager
    def of_blocks(self, model: Model) -> Iterator[None]:
        """Inside, forwards of the model are counted."""

        def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._inputs += args[0].untyped_storage().nbytes()
            self._before_block = self.total

        def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._blocks.append(self.total - self._before_block)

        hooks: list[Any] = []
        for i in range(len(model.blocks)):
            module = model.backbone.module(i)
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def with_recompute(self) -> int:
        """Blocks keep their inputs only, and the largest of them is computed again at its time (Chen et al. 2016,
        arXiv 1604.06174). Where the net keeps a block's input anyway it is counted twice: a little too much."""
        return self.total - sum(self._blocks) + self._inputs + max(self._blocks, default=0)


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """As torch.autocast, which would switch itself off on a machine without a GPU."""
    torch.set_autocast_enabled(PRETENDED, dtype is not None)
    if dtype is not None:
        torch.set_autocast_dtype(PRETENDED, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(PRETENDED, False)
        torch.clear_autocast_cache()


def optimizer_bytes(optim: OptimSpec, element: int = 4) -> int:
    """Bytes of state that the optimiser keeps for each parameter of `element` bytes: 4 for momentum, 8 for Adam."""
    parameter = nn.Parameter(torch.zeros(64, 64, dtype=torch.float64 if element == 8 else torch.float32))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = optim.build([{"params": [parameter], "weight_decay": 0.0, "lr_scale": 1.0}])
    optimizer.step()
    state = optimizer.state[parameter].values()
    held = sum(v.numel() * v.element_size() for v in state if isinstance(v, Tensor) and v.numel() > 1)
    return held // parameter.numel()
