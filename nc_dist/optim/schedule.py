"""Learning rate over a run: linear warm-up, then one of several courses. Pure arithmetic."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from nc_dist.spec import Spec


class Schedule(Spec):
    """Learning rate over the run: linear warm-up, then cosine to zero, or constant."""

    kind: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)  # fraction of all steps

    def lr(self, peak: float, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        warmup_steps = round(self.warmup * steps)
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        if self.kind == "constant":
            return peak
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * done))
