"""A linear layer as classifier: the default, the one that every transfer gets."""

from typing import Literal

from torch import Tensor, nn

from nc_dist.spec import Spec


class Linear(nn.Linear):
    """(B, E) -> logits (B, K): one linear map, both of its parts trained."""

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight (K, E) and bias (K,) of the linear map whose argmax is the classifier's."""
        return self.weight, self.bias


class LinearClassifier(Spec):
    """logits = W h + b."""

    kind: Literal["linear"] = "linear"

    def build(self, dim: int, num_classes: int) -> Linear:
        """The classifier of embeddings (B, dim)."""
        return Linear(dim, num_classes)
