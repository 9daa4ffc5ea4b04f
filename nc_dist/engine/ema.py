"""Moving averages of weights and running statistics. Held by the engines, which know where their tensors are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """The moving average of `tensors`, which change in place: kept <- d * kept + (1 - d) * tensor after each step.

    d is `decay`, in the first steps less, (1 + n) / (10 + n) after n of them, so that a short run is not all beginning.
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        self.tensors, self.decay = list(tensors), decay
        self.kept = [tensor.detach().clone() for tensor in tensors]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """To be called after each step that moved the weights."""
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(self.kept, self.tensors, share)

    def state(self) -> dict[str, object]:
        """What `restore` needs, to be saved."""
        return {"kept": self.kept, "steps": self.steps}

    @torch.no_grad()
    def restore(self, kept: Sequence[Tensor] | None = None, steps: int = 0) -> None:
        """Go on from saved averages; without any (of a run that kept none), begin at the tensors as they are now."""
        self.steps = steps
        for own, saved in zip(self.kept, self.tensors if kept is None else kept, strict=True):
            own.copy_(saved)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the tensors have the values of their averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for tensor, kept in zip(self.tensors, self.kept, strict=True):
            value = tensor.clone()
            tensor.copy_(kept)
            kept.copy_(value)
