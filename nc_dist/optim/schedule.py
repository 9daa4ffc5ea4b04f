"""Learning rate over a run: linear warm-up, then one of several courses. Pure arithmetic."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nc_dist.spec import Spec

KEYS = {"end": ("cosine", "linear"), "milestones": ("step",), "gamma": ("step",)}  # which kinds have them


class Schedule(Spec):
    """Linear warm-up to the peak; then down to `end` as a cosine or a line, down at each milestone, or constant."""

    kind: Literal["cosine", "linear", "step", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)  # fraction of all steps
    end: float = Field(0.0, ge=0, le=1)  # fraction of the peak that cosine and line would reach after the last step
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (1 / 3, 2 / 3, 8 / 9)  # fractions of all steps
    gamma: float = Field(0.1, gt=0, lt=1)  # the factor at each milestone

    @model_validator(mode="after")
    def _has_only_its_own_keys(self) -> Self:
        for key, kinds in KEYS.items():
            value = getattr(self, key)
            if self.kind not in kinds and value != type(self).model_fields[key].default:
                raise ValueError(f"{key}={value}: kind={self.kind} has no such key, it is one of {' and '.join(kinds)}")
        if self.kind == "step" and not (self.milestones and self.warmup < self.milestones[0]):
            raise ValueError(f"milestones={self.milestones}: the first one must come after warmup={self.warmup}")
        if any(a >= b for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"milestones={self.milestones}: they must ascend")
        return self

    def lr(self, peak: float, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        warmup_steps = round(self.warmup * steps)
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        if self.kind == "constant":
            return peak
        if self.kind == "step":
            return peak * self.gamma ** sum(step >= round(milestone * steps) for milestone in self.milestones)
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
        left = 1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return peak * (self.end + (1 - self.end) * left)
