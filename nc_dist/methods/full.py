"""Full fine-tuning: everything is trained, with a new classifier."""

from __future__ import annotations

from typing import Literal

from nc_dist.model import Model, with_new_classifier
from nc_dist.spec import Spec


class Full(Spec):
    """All parameters."""

    kind: Literal["full"] = "full"

    def apply(self, source: Model, num_classes: int, seed: int) -> Model:
        model = with_new_classifier(source, num_classes, seed=seed)
        return model.requires_grad_(True)
