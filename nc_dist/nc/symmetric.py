"""The sum of X^T X over batches of rows, at the speed of a matrix product and with the accuracy of fp64. For `moments`.

Only the blocks on and above the diagonal are kept: eight block rows are 9/16 of the work, the memory and the traffic.
fp32 rows are multiplied in fp32 into a buffer, which is added to the fp64 total now and then.

Letters: B rows of a batch, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BUFFERED_ROWS = 2048  # that go into the fp32 buffer before it is emptied: its rounding stays that of a few products
PIECE = 2**16  # numbers that the buffer is emptied by at a time
SMALLEST_BLOCK = 128  # dimensions: below it, a product of its own costs more than it saves


class SymmetricSum:
    """`total` holds the block rows one after another, fp64: sums of several ranks or parts simply add up."""

    def __init__(self, dim: int, blocks: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.dim, self.dtype = dim, dtype
        height = max(-(-dim // blocks), min(dim, SMALLEST_BLOCK))
        self._edges = [(low, min(low + height, dim)) for low in range(0, dim, height)]
        size = sum((high - low) * (dim - low) for low, high in self._edges)
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        self._buffer: Tensor | None = None
        self._rows = 0

    def add(self, rows_BD: Tensor) -> None:
        """Add X^T X of rows of `dtype`."""
        if self.dtype == torch.float64:
            self._multiply(self.total, rows_BD, rows_BD)
            return
        if self._buffer is None:
            self._buffer = torch.zeros_like(self.total, dtype=self.dtype)
        self._multiply(self._buffer, rows_BD, rows_BD)
        self._rows += len(rows_BD)
        if self._rows >= BUFFERED_ROWS:
            self._empty(self._buffer)

    def add_difference(self, plus_BD: Tensor, minus_BD: Tensor) -> None:
        """Add P^T P - M^T M of fp64 rows."""
        self._multiply(self.total, plus_BD, plus_BD)
        self._multiply(self.total, minus_BD, minus_BD, alpha=-1)

    def settle(self) -> Tensor:
        """The total with everything in it; the buffer is given back."""
        if self._buffer is not None:
            self._empty(self._buffer)
            self._buffer = None
        return self.total

    def dense(self) -> Tensor:
        """The whole symmetric sum: (D, D) fp64."""
        full_DD = self.total.new_zeros(self.dim, self.dim)
        for (low, high), block in self._blocks(self.settle()):
            full_DD[low:high, low:] = block
        upper_DD = full_DD.triu()
        return upper_DD + upper_DD.triu(1).T

    def _empty(self, buffer: Tensor) -> None:
        # In pieces: the copy in fp64 that adding makes then stays in the processor's cache, five times as fast.
        for total, part in zip(torch.split(self.total, PIECE), torch.split(buffer, PIECE), strict=True):
            total += part
            part.zero_()
        self._rows = 0

    def _multiply(self, into: Tensor, left_BD: Tensor, right_BD: Tensor, alpha: float = 1) -> None:
        for (low, high), block in self._blocks(into):
            block.addmm_(left_BD[:, low:high].T, right_BD[:, low:], alpha=alpha)  # in place: never autocast

    def _blocks(self, flat: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Each block row's first and last row, and its view (rows, columns from the first row on)."""
        start = 0
        for low, high in self._edges:
            size = (high - low) * (self.dim - low)
            yield (low, high), flat[start : start + size].view(high - low, self.dim - low)
            start += size
