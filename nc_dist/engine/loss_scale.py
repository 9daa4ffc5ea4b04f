"""The factor by which losses of an fp16 forward are multiplied, so that small gradients do not become 0. For DeepSpeed,
whose own scalers either need half-precision weights or clip the scaled gradients; torch has its GradScaler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PATIENCE = 2000  # steps without overflow after which the scale is doubled


@dataclass
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, arXiv 1710.03740), with the numbers of torch's GradScaler."""

    used: bool
    value: float = 2.0**16
    steady: int = 0  # steps since it last changed

    def update(self, finite: bool) -> None:
        """After each step: halve where its gradients were not finite, double when long all were."""
        self.steady = self.steady + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.steady == PATIENCE:
            self.value, self.steady = 2 * self.value, 0

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "steady": self.steady}

    def restore(self, value: float, steady: int) -> None:
        self.value, self.steady = value, steady
