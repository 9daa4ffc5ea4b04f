"""Layer fine-tuning (arXiv 2212.12206): one block of the backbone and a new classifier, all else frozen."""

from __future__ import annotations

from typing import Literal

from nc_dist.methods.freezing import block_module, find_block, train_only
from nc_dist.model import Model, with_new_classifier
from nc_dist.spec import Spec


class LayerFT(Spec):
    """`block` null takes the fixed default of the family."""

    kind: Literal["layer_ft"] = "layer_ft"
    block: str | None = None

    def apply(self, source: Model, num_classes: int, seed: int) -> Model:
        model = with_new_classifier(source, num_classes, seed=seed)
        assert model.classifier is not None
        return train_only(model, [model.classifier, block_module(model, find_block(model, self.block))])
