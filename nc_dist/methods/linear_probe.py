"""Linear probe: a new classifier on frozen features, fitted exactly instead of by SGD (see probe.py)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nc_dist.methods.freezing import train_only
from nc_dist.model import Model, with_new_classifier
from nc_dist.spec import Spec


class LinearProbe(Spec):
    """Trains the classifier only; `l2` are the strengths among which the validation part of train chooses."""

    kind: Literal["linear_probe"] = "linear_probe"
    l2: tuple[Annotated[float, Field(ge=0)], ...] = Field((1e-4, 1e-3, 1e-2, 1e-1, 1.0), min_length=1)

    def apply(self, source: Model, num_classes: int, seed: int) -> Model:
        model = with_new_classifier(source, num_classes, seed=seed)
        assert model.classifier is not None
        return train_only(model, [model.classifier])
