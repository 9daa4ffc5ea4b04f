"""A cosine classifier: logits are the cosines of the angles between embedding and class vectors."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nc_dist.spec import Spec


class Cosine(nn.Module):
    """(B, E) -> logits (B, K) = scale * cos(h, w_k); the class vectors w_k are trained, of them only the direction."""

    def __init__(self, dim: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = dim, num_classes, scale
        self.weight = nn.Linear(dim, num_classes, bias=False).weight

    def forward(self, embedding_BE: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(embedding_BE), F.normalize(self.weight))

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight (K, E) and bias (K,) of the linear map whose argmax is the classifier's: unit rows, no bias."""
        return F.normalize(self.weight), self.weight.new_zeros(self.out_features)


class CosineClassifier(Spec):
    """logits = scale * cos(h, w_k). `scale` is the inverse of a temperature; 1 where the loss has one of its own."""

    kind: Literal["cosine"] = "cosine"
    scale: float = Field(1.0, gt=0)

    def build(self, dim: int, num_classes: int) -> Cosine:
        """The classifier of embeddings (B, dim)."""
        return Cosine(dim, num_classes, self.scale)
