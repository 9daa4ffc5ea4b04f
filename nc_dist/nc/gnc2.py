"""GNC2, the one-against-the-hull margin of a classifier or of class means: neural collapse with K > D classes.

All K distances are minima over a simplex, found together by moves with exact line search. Each move gives both bounds
of every distance, so rows that cannot hold the smallest one leave at once: most inputs keep one row after 30 moves.

Letters: K rows, D dimensions, C rows solved at a time, F points that a row has weight on, G = F - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nc_dist.nc.statistics import Undefined

CHUNK_ROWS = 512  # distances sought at a time: bounds the memory, about ten C x K matrices
HARD = 100  # moves after which a row is solved on its own points as well, one row at a time
MOST_MOVES = 2000  # before giving up
LENGTHS = (1e-3, 1e8)  # bounds of a gradient move's length, the inverse curvature


def gnc2(rows_KD: Tensor, tolerance: float = 1e-9) -> float:
    """rho = min_k dist(w_k, conv{w_j, j != k}) of the rows divided by their norms (Jiang et al. 2023,
    arXiv 2310.05351, GNC2: the one-versus-rest distance); 0 when two rows coincide, at most K/(K-1).

    rows: class means or a classifier's weight. The value is at most `tolerance` above rho. Undefined for fewer than
    two rows, for a zero row, and when the bounds of rho do not come as close as `tolerance`.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance {tolerance}: expected a positive number")
    points_KD, best = _points(rows_KD), float("inf")
    for own_C in torch.split(torch.arange(len(points_KD), device=points_KD.device), CHUNK_ROWS):
        best = _smallest(points_KD, own_C, best, tolerance)
    return best


def _points(rows_KD: Tensor) -> Tensor:
    """The rows as unit vectors about their mean, fp64, in at most K coordinates: the distances are the same."""
    rows_KD = rows_KD.detach().double()
    if not rows_KD.isfinite().all():
        raise ValueError("rows: expected finite values")
    if len(rows_KD) < 2:
        raise Undefined("only one class has samples" if len(rows_KD) else "no samples")
    norms_K = rows_KD.norm(dim=1)
    if not norms_K.all():
        raise Undefined(f"row {int(norms_K.argmin())} is zero and has no direction")
    unit_KD = rows_KD / norms_K[:, None]
    points_KD: Tensor = unit_KD - unit_KD.mean(0)
    if len(points_KD) >= points_KD.shape[1]:
        return points_KD
    triangle_KK: Tensor = torch.linalg.qr(points_KD.T).R
    return triangle_KK.T.contiguous()


def _smallest(points_KD: Tensor, own_C: Tensor, best: float, tolerance: float) -> float:
    """The smallest distance of the points `own_C` from the hull of the others, or `best` if that is smaller.

    With weights l in the simplex and r = w_k - sum_j l_j w_j the distance lies between min_j <w_k - w_j, r>/|r| and
    |r|. A gradient move changes all weights, which settles rows near a simplex frame in a few; a swap changes two.
    """
    squares_K = points_KD.square().sum(1)
    nearest_C = _without_own(points_KD[own_C] @ points_KD.T - squares_K / 2, own_C).argmax(1)
    weights_CK = torch.zeros(len(own_C), len(points_KD)).to(points_KD).scatter(1, nearest_C[:, None], 1.0)
    residual_CD, lengths_C1 = points_KD[own_C] - points_KD[nearest_C], torch.ones(len(own_C), 1).to(points_KD)
    for count in range(MOST_MOVES):
        scores_CK = _without_own(residual_CD @ points_KD.T, own_C)
        upper_C = residual_CD.norm(dim=1)
        margin_C = (points_KD[own_C] * residual_CD).sum(1) - scores_CK.amax(1)
        lower_C = (margin_C / upper_C.clamp(min=1e-300)).clamp(min=0)
        best = min(best, float(upper_C.min()))
        open_C = lower_C < best - tolerance
        if not open_C.any():
            return best
        own_C, weights_CK, residual_CD, lengths_C1, scores_CK = (
            rows[open_C] for rows in (own_C, weights_CK, residual_CD, lengths_C1, scores_CK)
        )
        kind = count % (2 if count < HARD else 3)
        if kind == 0:
            move_CK = _gradient_move(weights_CK, scores_CK, lengths_C1)
        else:
            move_CK = _swap(weights_CK, scores_CK) if kind == 1 else _face_move(weights_CK, residual_CD, points_KD)
        move_CD = move_CK @ points_KD
        squared_C1 = move_CD.square().sum(1, keepdim=True).clamp(min=1e-300)
        if kind == 0:  # the next length is that of Barzilai & Borwein (1988)
            lengths_C1 = (move_CK.square().sum(1, keepdim=True) / squared_C1).clamp(*LENGTHS)
        step_C1 = ((residual_CD * move_CD).sum(1, keepdim=True) / squared_C1).clamp(0, 1)
        weights_CK, residual_CD = weights_CK + step_C1 * move_CK, residual_CD - step_C1 * move_CD
    raise Undefined(f"rho lies between {float(lower_C.min())} and {best}, farther apart than {tolerance}")


def _without_own(scores_CK: Tensor, own_C: Tensor) -> Tensor:
    return scores_CK.scatter(1, own_C[:, None], -torch.inf)


def _gradient_move(weights_CK: Tensor, scores_CK: Tensor, lengths_C1: Tensor) -> Tensor:
    """To the projection on the simplex of a step against the gradient of |r|^2/2, which is minus the scores."""
    # Less the largest score, so that rounding in a long step spares the weights that are not zero.
    return _on_simplex(weights_CK + lengths_C1 * (scores_CK - scores_CK.amax(1, keepdim=True))) - weights_CK


def _swap(weights_CK: Tensor, scores_CK: Tensor) -> Tensor:
    """All weight of the worst point to the best one: pairwise Frank-Wolfe (Lacoste-Julien & Jaggi 2015, 1511.05932)."""
    best_C1 = scores_CK.argmax(1, keepdim=True)
    worst_C1 = scores_CK.masked_fill(weights_CK <= 0, torch.inf).argmin(1, keepdim=True)
    moved_C1 = weights_CK.gather(1, worst_C1)
    return torch.zeros_like(weights_CK).scatter_add(1, best_C1, moved_C1).scatter_add(1, worst_C1, -moved_C1)


def _face_move(weights_CK: Tensor, residual_CD: Tensor, points_KD: Tensor) -> Tensor:
    """To the minimum over the points in use, fewer of them where the minimum over their affine hull has weights
    below zero (Wolfe 1976, the minor cycle of the minimum-norm point)."""
    solved_CK = weights_CK.clone()
    for weights_K, residual_D in zip(solved_CK, residual_CD, strict=True):
        room = 0.0
        while room < 1:
            used_F = weights_K.nonzero().flatten()
            spans_GD = points_KD[used_F[1:]] - points_KD[used_F[0]]
            change_G = torch.linalg.pinv(spans_GD.T) @ residual_D
            change_F = torch.cat([-change_G.sum()[None], change_G])
            rooms_F = torch.where(change_F < 0, -weights_K[used_F] / change_F, torch.inf)
            room = min(float(rooms_F.min()), 1.0)
            weights_K[used_F] = (weights_K[used_F] + room * change_F).masked_fill(rooms_F <= room, 0.0)
            residual_D = residual_D - room * (change_G @ spans_GD)
    return solved_CK - weights_CK


def _on_simplex(values_CK: Tensor) -> Tensor:
    """The nearest points of the simplex: max(v - c, 0) with c such that they add up to 1."""
    sorted_CK = values_CK.sort(dim=1, descending=True).values
    shifts_CK = (sorted_CK.cumsum(1) - 1) / torch.arange(1, values_CK.shape[1] + 1).to(values_CK)
    last_C1 = (sorted_CK > shifts_CK).sum(1, keepdim=True) - 1
    return (values_CK - shifts_CK.gather(1, last_C1)).clamp(min=0)
