"""What one forward gives: the words in which models, losses and measures speak to each other.

Letters: B batch, d features, E embedding (after the head), K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Outputs(NamedTuple):
    """Features before the head, embedding after it, logits if there is a classifier."""

    features_Bd: Tensor
    embedding_BE: Tensor
    logits_BK: Tensor | None

    @property
    def logits(self) -> Tensor:
        """The logits (B, K) of a model that has a classifier."""
        assert self.logits_BK is not None, "a loss of logits was given a model without a classifier"
        return self.logits_BK

    def widened(self) -> Outputs:
        """Half precision as fp32, so that no loss is computed in half precision."""
        features, embedding, logits = self
        wide = full(features)
        same = embedding is features
        return Outputs(wide, wide if same else full(embedding), None if logits is None else full(logits))


def full(tensor: Tensor) -> Tensor:
    """Half precision as fp32; all else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
