"""Skip-connection layer fine-tuning, SCL FT (arXiv 2212.12206v4): one block, with a skip to the last features.

The tuned block's pooled features (class tokens in a ViT) are added to the last ones before the classifier, the shorter
of the two zero-padded, so that the block shapes the collapse of what the classifier sees.
"""

from __future__ import annotations

from typing import Literal

from nc_dist.methods.freezing import block_module, find_block, train_only
from nc_dist.model import Model, with_new_classifier
from nc_dist.spec import Spec


class SCLFT(Spec):
    """`block` null takes the fixed default of the family."""

    kind: Literal["scl_ft"] = "scl_ft"
    block: str | None = None

    def apply(self, source: Model, num_classes: int, seed: int) -> Model:
        block = find_block(source, self.block)
        model = with_new_classifier(source, num_classes, skip=block, seed=seed)
        assert model.classifier is not None
        return train_only(model, [model.classifier, block_module(model, block)])
