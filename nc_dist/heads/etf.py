"""A projector that is never trained: two simplex-ETF layers, which leave collapse to the embedding behind them."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nc_dist.errors import InputError
from nc_dist.spec import Spec


class ETFProjector(nn.Module):
    """(B, d) -> (B, output) of unit length. The weights are buffers: saved, never trained."""

    first: Tensor
    second: Tensor

    def __init__(self, dim: int, hidden: int, output: int) -> None:
        super().__init__()
        self.register_buffer("first", etf_weight(hidden, dim, output))
        self.register_buffer("second", etf_weight(output, hidden, output))

    def forward(self, features_Bd: Tensor) -> Tensor:
        return F.normalize(F.linear(F.linear(features_Bd, self.first).relu(), self.second))


def etf_weight(rows: int, columns: int, c: int) -> Tensor:
    """sqrt(c / (c-1)) (I - 11^T / c), cut or continued to (rows, columns); a simplex ETF where both are c."""
    return math.sqrt(c / (c - 1)) * (torch.eye(rows, columns) - 1 / c)


class ETFHead(Spec):
    """Frozen layers without bias, ReLU between them, the output normalised (Harun et al. 2025, arXiv 2502.10691).

    Both sizes are at least that of the features. Else the first layer, which takes sum / output off each feature, would
    leave nothing above zero of many an image: ReLU makes all of it 0, embedding and gradient alike.
    """

    kind: Literal["etf"] = "etf"
    hidden: int = Field(2048, ge=1)
    output: int = Field(0, ge=0)  # 0: as wide as the features

    def build(self, dim: int) -> tuple[nn.Module, int]:
        """The module and the size of what it puts out; InputError for a size below `dim`."""
        output = self.output or dim
        for key, size in (("hidden", self.hidden), ("output", output)):
            if size < dim:
                raise InputError(
                    f"model.head.{key}={size}: an etf head of {dim} features keeps them all; set {dim} or more"
                )
        return ETFProjector(dim, self.hidden, output), output
