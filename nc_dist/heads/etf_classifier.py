"""A classifier that is fixed from the start at what neural collapse would make of it: a simplex ETF."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nc_dist.errors import InputError
from nc_dist.spec import Spec


def simplex_etf(num_classes: int, dim: int, seed: int) -> Tensor:
    """K unit rows in `dim` >= K - 1 dimensions, each two at the cosine -1 / (K - 1), turned at random.

    sqrt(K / (K-1)) (I - 11^T / K) P^T with P partial orthogonal (Papyan et al. 2020, definition 1), P being of the
    K - 1 dimensions that the centring leaves. (K, dim), the same for the same seed; other random numbers are untouched.
    """
    random = torch.Generator("cpu").manual_seed(seed)
    axes = torch.linalg.qr(torch.empty(dim, num_classes - 1, dtype=torch.float64).normal_(generator=random)).Q
    eye = torch.eye(num_classes, dtype=torch.float64)
    centred = torch.linalg.qr(torch.cat([torch.ones_like(eye[:, :1]), eye[:, 1:]], 1)).Q[:, 1:]
    rows: Tensor = math.sqrt(num_classes / (num_classes - 1)) * centred @ axes.T
    return rows.to(torch.get_default_dtype())


class ETF(nn.Module):
    """(B, E) -> logits (B, K) = M h with M a simplex ETF. The weight is a buffer: saved, never trained."""

    weight: Tensor

    def __init__(self, weight_KE: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_KE.shape
        self.register_buffer("weight", weight_KE)

    def forward(self, embedding_BE: Tensor) -> Tensor:
        return F.linear(embedding_BE, self.weight)

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight (K, E) and bias (K,), which is zero."""
        return self.weight, self.weight.new_zeros(self.out_features)


class ETFClassifier(Spec):
    """A fixed simplex ETF without bias; `seed` turns it, apart from the run's seed."""

    kind: Literal["etf"] = "etf"
    seed: int = Field(0, ge=0, lt=2**63)

    def build(self, dim: int, num_classes: int) -> ETF:
        """The classifier of embeddings (B, dim); InputError where a simplex ETF has no room."""
        if not 2 <= num_classes <= dim + 1:
            raise InputError(
                f"model.classifier.kind=etf: a simplex ETF of {num_classes} classes needs at least 2 classes and "
                f"{num_classes - 1} dimensions, the embedding has {dim}; set model.head.output or the backbone's width "
                "higher, or model.classifier.kind=linear"
            )
        return ETF(simplex_etf(num_classes, dim, self.seed))
