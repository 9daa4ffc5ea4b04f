"""GNC2 against closed forms and an independent solver of the distance from a point to a hull.

Letters: K rows, D dimensions.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nc_reference import randn
from scipy.optimize import minimize, nnls
from torch import Tensor

from nc_dist.nc.gnc2 import CHUNK_ROWS, gnc2
from nc_dist.nc.statistics import Undefined


def polygon(sides: int) -> Tensor:
    angles_K = torch.arange(sides).double() * 2 * math.pi / sides
    return torch.stack([angles_K.cos(), angles_K.sin()], 1)


def distances(rows_KD: Tensor) -> list[float]:
    """|w_k - hull| by non-negative least squares: the minimum of |V u|^2 + (1'u - 1)^2 over u >= 0, where V has columns
    w_j - w_k, is d^2/(1 + d^2)."""
    unit = torch.nn.functional.normalize(rows_KD.double()).numpy()
    found = []
    for k in range(len(unit)):
        columns = np.vstack([(np.delete(unit, k, 0) - unit[k]).T, np.ones(len(unit) - 1)])
        solution, _ = nnls(columns, np.eye(len(columns))[-1], maxiter=10_000)
        found.append(float(np.linalg.norm(columns[:-1] @ solution / solution.sum())))
    return found


@pytest.mark.parametrize("sides", [4, 5, 12, 61])
def test_a_regular_polygon_is_one_minus_a_cosine_from_the_chord_of_its_neighbours(sides):
    assert gnc2(polygon(sides)) == pytest.approx(1 - math.cos(2 * math.pi / sides), abs=1e-9)


@pytest.mark.parametrize("classes", [3, 4, 10, 100])
def test_a_simplex_frame_reaches_the_largest_value(classes):
    frame = torch.eye(classes).double() - 1 / classes
    assert gnc2(frame) == pytest.approx(classes / (classes - 1), abs=1e-9)
    rotated = torch.linalg.qr(randn(0, classes + 7, classes)).Q[:, :classes]
    assert gnc2(frame @ rotated.T) == pytest.approx(classes / (classes - 1), abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[2.0, 0.0], [-0.1, 0.0]], 2.0),
        ([[3.0], [-1.0]], 2.0),
        ([[1.0, 0.0], [0.0, 5.0]], math.sqrt(2)),
        ([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-1.0, 0.0]], 0.0),
    ],
    ids=["antipodal", "on a line", "orthogonal", "two coincide"],
)
def test_few_rows_by_hand(rows, expected):
    assert gnc2(torch.tensor(rows)) == pytest.approx(expected, abs=1e-9)


def test_the_corners_of_cubes_and_cross_polytopes():
    cube = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)))
    assert gnc2(cube) == pytest.approx(2 / 5, abs=1e-9)  # to the plane through the five neighbours
    assert gnc2(torch.cat([torch.eye(20), -torch.eye(20)])) == pytest.approx(1, abs=1e-9)


def test_it_is_the_smallest_distance_by_sequential_quadratic_programming():
    rows_KD = randn(3, 12, 5)
    unit = torch.nn.functional.normalize(rows_KD).numpy()
    found = []
    for k in range(12):
        others = np.delete(unit, k, 0)
        solved = minimize(
            lambda weights, w=unit[k], v=others: ((w - weights @ v) ** 2).sum(),
            np.full(11, 1 / 11),
            jac=lambda weights, w=unit[k], v=others: -2 * v @ (w - weights @ v),
            method="SLSQP",
            bounds=[(0, 1)] * 11,
            constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        found.append(math.sqrt(solved.fun))
    assert gnc2(rows_KD) == pytest.approx(min(found), abs=1e-7)
    assert min(distances(rows_KD)) == pytest.approx(min(found), abs=1e-7)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.integers(2, 40),
    st.integers(1, 24),
    st.integers(0, 10**6),
    st.sampled_from(["", "offset", "weak", "signs", "near"]),
)
def test_it_is_the_smallest_distance_by_non_negative_least_squares(classes, dim, seed, kind):
    rows_KD = randn(seed, classes, dim)
    if kind == "offset":
        rows_KD += 10 ** (seed % 4) * randn(seed + 1, 1, dim)
    elif kind == "weak":
        rows_KD *= torch.logspace(0, -4, dim)
    elif kind == "signs":
        rows_KD = rows_KD.sign()
    elif kind == "near":
        rows_KD = rows_KD[: (classes + 2) // 3].repeat(3, 1)[:classes] + 10.0 ** -(seed % 6) * randn(
            seed + 1, classes, dim
        )
    expected = min(distances(rows_KD))
    assert expected - 1e-11 <= gnc2(rows_KD) <= expected + 1.01e-9


@pytest.mark.parametrize("place", [0, CHUNK_ROWS + 5, -1])
def test_the_row_nearest_to_the_others_is_found_in_any_chunk(place):
    rows_KD = torch.eye(2 * CHUNK_ROWS + 10)
    rows_KD[place] = rows_KD[7] + rows_KD[30] + rows_KD[-9]
    assert gnc2(rows_KD) == pytest.approx(1 - 1 / math.sqrt(3), abs=1e-9)


def test_norms_and_types_of_the_rows_do_not_matter():
    rows_KD = torch.randint(-9, 9, (15, 6), generator=torch.Generator().manual_seed(0))
    exact = gnc2(rows_KD.double())
    assert exact == pytest.approx(min(distances(rows_KD)), abs=1e-9)
    for other_KD in (rows_KD, rows_KD.bfloat16().requires_grad_(), rows_KD * 2 ** torch.arange(15)[:, None]):
        assert gnc2(other_KD) == pytest.approx(exact, abs=1e-9)


def test_a_coarse_tolerance_is_kept_to_as_well():
    rows_KD = randn(5, 60, 12)
    exact = gnc2(rows_KD, tolerance=1e-12)
    for tolerance in (1e-1, 1e-3, 1e-6):
        assert exact - 1e-12 <= gnc2(rows_KD, tolerance) <= exact + tolerance


def test_bounds_that_do_not_meet_are_said_and_no_value_is_given(monkeypatch):
    monkeypatch.setattr("nc_dist.nc.gnc2.MOST_MOVES", 5)
    with pytest.raises(Undefined, match="rho lies between 0.* and 0.*, farther apart than 1e-09"):
        gnc2(randn(5, 20, 4))


def test_rows_without_direction_and_single_rows_have_no_value():
    with pytest.raises(Undefined, match="row 1 is zero"):
        gnc2(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))
    with pytest.raises(Undefined, match="only one class"):
        gnc2(torch.ones(1, 3))
    with pytest.raises(Undefined, match="no samples"):
        gnc2(torch.ones(0, 3))


@pytest.mark.parametrize("wrong", [0.0, -1e-9, math.nan])
def test_a_tolerance_must_be_positive_and_rows_finite(wrong):
    with pytest.raises(ValueError, match="tolerance"):
        gnc2(torch.eye(3), wrong)
    with pytest.raises(ValueError, match="finite"):
        gnc2(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
