"""What the metrics are functions of: centred statistics of labelled features, and what several metrics derive of them.

`ClassMoments.statistics()` makes them; every metric takes them, or ClassMoments in their place (`Moments`).

Letters: K classes, P non-empty classes, D feature dimensions, N samples, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from nc_dist.nc import inverse_root

CHUNK_ROWS = 2048  # class means that are centred at a time: bounds the memory beside K x D
COINCIDENT = 1e-13  # of the largest norm of a class mean: means as close as this differ by rounding alone,
BURIED = 1e-7  # and so do those as close as this share of the within-class standard deviation


class Moments(Protocol):
    """Statistics, or an accumulator that gives them."""

    def statistics(self) -> Statistics: ...


class Undefined(ValueError):
    """The metric has no value for these statistics; the message says why."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """All fp64; an empty class has count, mean and scatter 0. Equal on every rank after `ClassMoments.all_reduce`."""

    n_K: Tensor  # samples of each class
    means_KD: Tensor  # mu_k
    scatter_DD: Tensor  # S = sum_i (x_i - mu_{y_i})(x_i - mu_{y_i})^T: pooled over classes, not divided
    within_K: Tensor  # t_k = sum_{i in k} |x_i - mu_k|^2, not divided
    quantum_D: Tensor  # sum_i ulp(x_ij)^2 / 12: the scatter that rounding to the features' type adds, not divided
    halves: tuple[Moments, Moments] | None = None  # of the samples, where they were kept (HalvedMoments)

    @cached_property
    def present_P(self) -> Tensor:
        """The non-empty classes, ascending: int64."""
        return self.n_K.nonzero().flatten()

    @cached_property
    def counts_P(self) -> Tensor:
        """Samples of the non-empty classes, fp64."""
        return self.n_K[self.present_P]

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.n_K.sum())

    @property
    def dim(self) -> int:
        """D."""
        return self.means_KD.shape[1]

    @cached_property
    def global_mean_D(self) -> Tensor:
        """mu_G, the mean of all samples; Undefined without samples."""
        if not len(self.present_P):
            raise Undefined("no samples")
        return (self.n_K / self.n_K.sum()) @ self.means_KD

    def expect_within(self) -> None:
        """Undefined when there is nothing to see within any class."""
        if self.num_samples == len(self.present_P) > 1:
            raise Undefined("one sample a class says nothing about the variability within it")

    def centred_chunks(self, centre_D: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(counts (C,), rows mu_k - mu_G (C, D)) of the non-empty classes, a few at a time.

        Undefined for one class, or when all class means coincide.
        """
        centre_D = self.global_mean_D if centre_D is None else centre_D
        if len(self.present_P) < 2:
            raise Undefined("only one class has samples")
        noise = float((self.scatter_DD.trace() / self.n_K.sum()).clamp(min=0).sqrt())
        if self._spread <= max(COINCIDENT * self._largest, BURIED * noise):
            raise Undefined("all class means coincide")
        for chosen in torch.split(self.present_P, CHUNK_ROWS):
            yield self.n_K[chosen], self.means_KD[chosen] - centre_D

    @cached_property
    def _spread(self) -> float:
        """The largest distance of a class mean from mu_G."""
        chunks = torch.split(self.present_P, CHUNK_ROWS)
        return max(float((self.means_KD[chosen] - self.global_mean_D).norm(dim=1).max()) for chosen in chunks)

    @cached_property
    def _largest(self) -> float:
        return max(float(rows.norm(dim=1).max()) for rows in torch.split(self.means_KD, CHUNK_ROWS))

    @cached_property
    def between_DD(self) -> Tensor:
        """sum_k (mu_k - mu_G)(mu_k - mu_G)^T over non-empty classes: K Sigma_B."""
        return _sum_of_products((rows for _, rows in self.centred_chunks()), self.scatter_DD)

    @cached_property
    def weighted_between_DD(self) -> Tensor:
        """sum_k n_k (mu_k - mu_G)(mu_k - mu_G)^T."""
        return _sum_of_products((rows * n.sqrt()[:, None] for n, rows in self.centred_chunks()), self.scatter_DD)

    @cached_property
    def total_eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (D,) ascending, not negative, and eigenvectors (D, D) in columns of the total scatter.

        S_T = S + sum_k n_k (mu_k - mu_G)(mu_k - mu_G)^T = sum_i (x_i - mu_G)(x_i - mu_G)^T. O(D^3), done once.
        """
        values_D, vectors_DD = torch.linalg.eigh(self.scatter_DD + self.weighted_between_DD)
        return values_D.clamp(min=0), vectors_DD

    @cached_property
    def root(self) -> tuple[Tensor, int]:
        """Y with Y^T Y = Sigma_B^+ and the rank of Sigma_B = (1/K) sum_k (mu_k - mu_G)(mu_k - mu_G)^T."""
        classes = len(self.present_P)
        if classes <= self.dim:
            return inverse_root.of_rows(centred_means(self) / classes**0.5, self.counts_P)
        return inverse_root.of_matrix(self.between_DD / classes)

    def statistics(self) -> Statistics:
        """Itself: what takes Moments takes both accumulators and these."""
        return self


def centred_means(moments: Moments) -> Tensor:
    """Rows mu_k - mu_G of the non-empty classes: (P, D). Undefined for one class or coincident means."""
    return torch.cat([rows for _, rows in moments.statistics().centred_chunks()])


def _sum_of_products(chunks: Iterator[Tensor], like_DD: Tensor) -> Tensor:
    total_DD = torch.zeros_like(like_DD)
    for rows_CD in chunks:
        total_DD.addmm_(rows_CD.T, rows_CD)
    return total_DD
