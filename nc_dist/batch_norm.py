"""Running statistics of BatchNorm that do not depend on the world size.

Torch updates them once a micro-batch, so their value depends on which micro-batches a rank happened to see. Here each
step makes one update, with the mean of the statistics of all the step's micro-batches on all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """Used once a step: `begin`, `collect` after each micro-batch's forward, `merge` at the end.

    Inside a step the layers have momentum 1, so that after a forward their buffers hold that batch's statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
        self.norms = norms
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.momenta = [0.1 if norm.momentum is None else norm.momentum for norm in norms]
        self._counts: list[Tensor] = []
        self._before: Tensor | None = None
        self._total: Tensor | None = None

    def begin(self) -> None:
        self._before = self._flat()
        self._counts = [norm.num_batches_tracked.clone() for norm in self.norms]  # type: ignore[union-attr]
        self._total = torch.zeros_like(self._before)
        for norm in self.norms:
            norm.momentum = 1.0

    def collect(self) -> None:
        assert self._total is not None
        self._total += self._flat()

    def totals(self) -> Tensor:
        """The sums over this rank's micro-batches, flat fp64: to be added up over ranks."""
        assert self._total is not None
        return self._total

    def merge(self, mean: Tensor, applied: bool = True) -> None:
        """One running update with `mean`, the statistics averaged over all micro-batches of the step, flat.

        After a step that was not applied there is none: the buffers are again what they were.
        """
        assert self._before is not None
        start = 0
        for norm, momentum, count in zip(self.norms, self.momenta, self._counts, strict=True):
            norm.momentum = momentum
            for buffer in (norm.running_mean, norm.running_var):
                assert buffer is not None
                part = slice(start, start + buffer.numel())
                new = torch.lerp(self._before[part], mean[part], momentum) if applied else self._before[part]
                buffer.copy_(new)
                start += buffer.numel()
            norm.num_batches_tracked.copy_(count + applied)  # type: ignore[union-attr]
        self._before = self._total = None

    def _flat(self) -> Tensor:
        buffers = [b for norm in self.norms for b in (norm.running_mean, norm.running_var) if b is not None]
        return torch.cat(buffers).double() if buffers else torch.zeros(0, dtype=torch.float64, device=self._device)
