"""The root of Sigma_B's pseudo-inverse, without ever making a D x D pinv. For `statistics`.

A plain pinv's default cut-off deletes weak directions of the class means, and those dominate NC1: by 99.99 % in fp32.

Letters: P non-empty classes, D feature dimensions, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

EIGENVALUE_CUTOFF = 1e-12  # of the largest of Sigma_B: a weaker direction has under four digits left in fp64


def of_rows(rows_PD: Tensor, null_P: Tensor) -> tuple[Tensor, int]:
    """Y (P or R, D) with Y^T Y = Sigma_B^+, and its rank R, for Sigma_B = A^T A of the rows A; `null_P` @ A = 0.

    G = A A^T + a q q^T, where q = null/|null| spans the null space of A A^T and a is its mean diagonal; then
    Sigma_B^+ = A^T G^{-2} A and Y = G^{-1} A. For P <= D.
    """
    gram_PP, null_P = rows_PD @ rows_PD.T, null_P / null_P.norm()
    inverse_PP = _inverse_factor(gram_PP + gram_PP.diagonal().mean() * null_P.outer(null_P))
    if inverse_PP is not None:
        return inverse_PP.T @ (inverse_PP @ rows_PD), len(rows_PD) - 1
    values_R1, vectors_RP = _kept(gram_PP)
    return vectors_RP @ rows_PD / values_R1, len(values_R1)


def of_matrix(between_DD: Tensor) -> tuple[Tensor, int]:
    """The same of Sigma_B itself: L^{-1} for Sigma_B = L L^T. For P > D."""
    inverse_DD = _inverse_factor(between_DD)
    if inverse_DD is not None:
        return inverse_DD, len(inverse_DD)
    values_R1, vectors_RD = _kept(between_DD)
    return vectors_RD / values_R1.sqrt(), len(values_R1)


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """L^{-1} of L L^T = matrix; None unless all eigenvalues are above the cut-off."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    inverse: Tensor = torch.linalg.solve_triangular(factor, torch.eye(len(matrix)).to(factor), upper=False)
    # tr(G) tr(G^-1) bounds the condition number.
    return inverse if matrix.trace() * inverse.square().sum() < 1 / EIGENVALUE_CUTOFF else None


def _kept(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (R, 1) above the cut-off and their eigenvectors in rows: for dependent class means."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > EIGENVALUE_CUTOFF * values[-1]
    return values[kept, None], vectors[:, kept].T
