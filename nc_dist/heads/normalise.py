"""The layer that puts embeddings on the unit sphere."""

import torch.nn.functional as F
from torch import Tensor, nn


class Normalise(nn.Module):
    """(B, d) -> (B, d), each row divided by its length."""

    def forward(self, x_Bd: Tensor) -> Tensor:
        return F.normalize(x_Bd)
