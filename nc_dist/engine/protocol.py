"""What the loop and the journeys need of an engine, plain torch or DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nc_dist.model import Model
from nc_dist.outputs import Outputs


class Engine(Protocol):
    """What the loop needs of plain torch or DeepSpeed. Calls that several ranks make are made by all of them."""

    module: Model
    input_dtype: torch.dtype

    def forward(self, x: Tensor, last: bool = True) -> Outputs:
        """Training forward; `last` says that the step's gradients are reduced in this backward."""

    def eval_forward(self, x: Tensor, gradients: bool = False) -> Outputs:
        """Forward in eval mode; with `gradients`, one can ask for those of the input."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, which is scaled already so that the step's losses add up."""

    def step(self, lr: float) -> bool:
        """Clip, update with this learning rate, clear the gradients; did the weights move?

        They do not, and nothing else of the optimiser does, where the gradients are not finite on any rank.
        """

    def average(self) -> None:
        """Move the averages, where they are kept, towards the weights and running statistics."""

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradients, before clipping."""

    def save(self, folder: Path, client_state: dict[str, Any]) -> list[Path]:
        """Each rank writes its own files; which these are. One that cannot write still takes part to the end."""

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what `save` wrote; returns the client state."""

    def gathered(self, part: nn.Module | None = None) -> AbstractContextManager[Model]:
        """The model with all its weights in place, in any ZeRO stage; those of one part of it, where that is named."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights and running statistics are the moving averages of an engine that keeps them."""


@contextmanager
def evaluating(module: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Eval mode inside, without gradients unless they are asked for; afterwards every submodule is as it was."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for m, training in modes:
            m.training = training
