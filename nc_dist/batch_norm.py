"""Running statistics of BatchNorm that do not depend on the world size.

Torch updates them once a micro-batch, so their value depends on which micro-batches a rank happened to see. Here each
step makes one update, with the mean of the statistics of all the step's micro-batches on all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nc_dist.errors import InputError


class RunningStatistics:
    """In each step: `begin`, `collect` after each micro-batch's forward, `merge` at the end.

    Inside a step the layers have momentum 1, so that after a forward their buffers hold that batch's statistics. All
    layers' numbers are handled as one flat tensor: a net has hundreds of small buffers, and a GPU waits for each call.
    InputError for layers with momentum=None, whose cumulative mean would count micro-batches.
    """

    def __init__(self, module: nn.Module) -> None:
        norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
        if any(norm.momentum is None for norm in norms):
            raise InputError("model: a BatchNorm with momentum=None keeps a cumulative mean; give it a momentum")
        self._norms, self._momenta = norms, [norm.momentum or 0.0 for norm in norms]
        self._buffers: list[Tensor] = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        self._counts: list[Tensor] = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        each = [
            torch.full((buffer.numel(),), momentum, dtype=torch.float64, device=device)
            for norm, momentum in zip(norms, self._momenta, strict=True)
            for buffer in (norm.running_mean, norm.running_var)
            if buffer is not None
        ]
        self._momentum = torch.cat([torch.zeros(0, dtype=torch.float64, device=device), *each])
        self._before = self._total = torch.zeros_like(self._momentum)
        self._counted = torch.zeros(0, device=device)

    def begin(self) -> None:
        self._before = self._flat()
        self._counted = torch.stack(self._counts) if self._counts else self._counted
        self._total = torch.zeros_like(self._before)
        for norm in self._norms:
            norm.momentum = 1.0

    def collect(self) -> None:
        self._total += self._flat()

    def totals(self) -> Tensor:
        """The sums over this rank's micro-batches, flat fp64: to be added up over ranks."""
        return self._total

    def merge(self, mean: Tensor, applied: bool = True) -> None:
        """One running update with `mean`, the statistics averaged over all micro-batches of the step, flat.

        After a step that was not applied there is none: the buffers are again what they were.
        """
        for norm, momentum in zip(self._norms, self._momenta, strict=True):
            norm.momentum = momentum
        if self._norms:
            new = torch.lerp(self._before, mean, self._momentum) if applied else self._before
            parts = torch.split(new.to(self._buffers[0].dtype), [buffer.numel() for buffer in self._buffers])
            torch._foreach_copy_(self._buffers, list(parts))
            torch._foreach_copy_(self._counts, list((self._counted + applied).unbind()))

    def _flat(self) -> Tensor:
        return torch.cat(self._buffers).double() if self._norms else torch.zeros_like(self._momentum)
