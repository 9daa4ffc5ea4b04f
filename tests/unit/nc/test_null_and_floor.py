"""What NC1 is read with: its null under permuted labels, its form for layers of any width, its quantisation floor.

Letters: B samples, K classes, D dimensions.
"""

from __future__ import annotations

from statistics import mean, stdev

import pytest
import torch
from nc_reference import accumulated, clusters, exact, nc1_by_svd, randn, two_pass
from torch import Tensor

from nc_dist.nc import HalvedMoments, Undefined, summary
from nc_dist.nc.variability import nc1, nc1_floor, nc1_null, nc1_pca, nc1_trace

WIDTHS = [64, 128, 256, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (512, 2048))]
QUICK = [("relu", 5, 2, 16), ("normal", 5, 2, 128), ("relu", 20, 2, 128), ("relu", 20, 5, 128), ("normal", 5, 20, 16)]
EVERY = [
    (kind, num, n, dim) for kind in ("normal", "relu") for num in (5, 20) for n in (2, 5, 20) for dim in (16, 64, 256)
]


def with_signal(kind: str, num_classes: int, per_class: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Classes that are apart. "relu": of uneven size, in heavy-tailed features of which many are zero."""
    sizes_K = torch.full((num_classes,), per_class)
    if kind == "relu":
        sizes_K = (torch.linspace(0.4, 1.6, num_classes) * per_class).round().long().clamp(min=1)
    labels_B = torch.repeat_interleave(torch.arange(num_classes), sizes_K)
    feats_BD = randn(seed, num_classes, dim)[labels_B] + randn(seed + 100, len(labels_B), dim)
    if kind == "relu":
        scale_BD = torch.exp(0.5 * randn(seed + 200, len(labels_B), 1)) * torch.arange(1.0, dim + 1) ** -0.5
        feats_BD = feats_BD.relu().square() * scale_BD
    return feats_BD, labels_B


@pytest.mark.parametrize(
    ("kind", "num_classes", "per_class", "dim"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in QUICK)],
)
def test_the_null_is_nc1_of_permuted_labels(kind: str, num_classes: int, per_class: int, dim: int) -> None:
    """Of means over three data sets, within three times the spread of single permutations."""
    deviations = []
    for seed in range(3):
        feats_BD, labels_B = with_signal(kind, num_classes, per_class, dim, seed)
        random = torch.Generator().manual_seed(seed)
        permuted = [labels_B[torch.randperm(len(labels_B), generator=random)] for _ in range(10)]
        values = [nc1_by_svd(two_pass(feats_BD, labels, num_classes)) for labels in permuted]
        null = nc1_null(accumulated(feats_BD.float(), labels_B, num_classes), draws=10)
        deviations.append((null - mean(values)) / stdev(values))
    assert abs(mean(deviations)) < 3


def test_the_null_is_a_function_of_the_moments_and_needs_samples_to_permute() -> None:
    feats_BD, labels_B = with_signal("normal", 5, 20, 16, 0)
    stats = exact(feats_BD, labels_B, 5)
    assert nc1_null(stats) == nc1_null(exact(feats_BD, labels_B, 5))
    assert nc1_null(stats) != nc1_null(stats, draws=6)
    state = torch.get_rng_state()
    nc1_null(stats)
    assert torch.equal(torch.get_rng_state(), state)
    shifted = nc1_null(exact(1e-3 * feats_BD + 5, labels_B, 5))
    assert shifted == pytest.approx(nc1_null(stats), rel=1e-9)
    with pytest.raises(Undefined, match="one sample a class"):
        nc1_null(exact(randn(0, 6, 4), torch.arange(6), 6))
    with pytest.raises(Undefined):
        nc1_null(exact(torch.ones(6, 4), torch.arange(6) % 3, 3))


@pytest.mark.parametrize("dim", WIDTHS)
def test_nc1_of_noise_falls_with_the_width_and_the_null_falls_with_it(dim: int) -> None:
    """About nK/(d-K), 8.7 at d = 64 and 0.22 at d = 2048: two widths can only be compared beside their nulls."""
    labels_B = torch.arange(10).repeat(50)
    found = [accumulated(randn(seed, 500, dim).float(), labels_B, 10).statistics() for seed in range(3)]
    values = [nc1(stats) for stats in found]
    assert mean(values) == pytest.approx(50 * 10 / (dim - 10), rel=0.2)
    assert mean(nc1_null(stats) for stats in found) == pytest.approx(mean(values), rel=0.2)


@pytest.mark.parametrize("dim", WIDTHS)
def test_the_pca_form_stays_where_it_is_over_widths(dim: int) -> None:
    """Ten orthogonal class means of norm 5 in unit noise, n = 200, and the noise alone: protocol.md, 1."""
    labels_B = torch.arange(10).repeat(200)
    signal_BD, noise = 5 * torch.eye(10, dim)[labels_B], [randn(seed, 2000, dim).float() for seed in range(3)]
    stats = accumulated(signal_BD + noise[0], labels_B, 10).statistics()
    assert 0.34 < nc1_pca(stats) < 0.62
    assert 0.03 * dim < nc1_trace(stats) < 0.05 * dim  # the trace ratio is of the width above all
    assert mean(nc1_pca(accumulated(feats_BD, labels_B, 10)) for feats_BD in noise) == pytest.approx(200, rel=0.25)


@pytest.mark.parametrize(
    ("dtype", "sigma"),
    [
        (torch.bfloat16, 4e-3),
        (torch.bfloat16, 1e-2),
        (torch.bfloat16, 1e-1),
        (torch.float16, 1e-3),
        (torch.float16, 1e-2),
    ],
)
def test_nc1_above_the_floor_is_that_of_the_features_before_rounding(dtype: torch.dtype, sigma: float) -> None:
    """Components are about 20/sqrt(512) = 0.9, their ulps 2^-8 and 2^-11 or twice that: the noise is one at least."""
    feats_BD, labels_B = clusters(10, 512, 50, sigma)
    truth = nc1_by_svd(two_pass(feats_BD, labels_B, 10))
    stats = accumulated(feats_BD.to(dtype), labels_B, 10).statistics()
    assert nc1(stats) - nc1_floor(stats) == pytest.approx(truth, rel=0.02)
    assert sigma not in (4e-3, 1e-3) or nc1(stats) > 1.03 * truth


def test_the_floor_is_nc1_of_the_scatter_that_rounding_adds() -> None:
    feats_BD, labels_B = clusters(6, 40, 20, 1e-2)
    expected = two_pass(feats_BD.bfloat16(), labels_B, 6)
    centred_KD = expected.means_KD - expected.means_KD.mean(0)
    inverse = torch.linalg.pinv(centred_KD.T @ centred_KD / 6, rtol=1e-10, hermitian=True)
    floor = float((inverse.diagonal() * expected.quantum_D).sum() / 120 / 6)
    assert nc1_floor(accumulated(feats_BD.bfloat16(), labels_B, 6)) == pytest.approx(floor, rel=1e-6)


@pytest.mark.parametrize("value", [1.0, 1.5, 1.9921875, 255.0, 2.0**-20, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_quantum_is_the_distance_to_the_next_number(dtype: torch.dtype, value: float) -> None:
    feats_BD = torch.tensor([[value], [-value]], dtype=dtype)
    above = torch.nextafter(feats_BD[0], torch.full_like(feats_BD[0], torch.inf))
    ulp = 0.0 if value == 0 else float(above.double() - feats_BD[0].double())
    if value == 2.0**-20 and dtype == torch.float16:
        ulp = 2.0**-30  # of subnormal numbers it is larger, which is of no matter beside a class mean
    assert float(exact(feats_BD, torch.tensor([0, 1]), 2).quantum_D) == pytest.approx(2 * ulp**2 / 12, rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "sigma", "flagged"),
    [
        (torch.float32, 1e-4, False),
        (torch.bfloat16, 1e-1, False),
        (torch.bfloat16, 1e-3, True),
        (torch.float16, 1e-2, False),
        (torch.float16, 1e-4, True),
    ],
)
def test_summary_warns_where_nc1_measures_rounding(dtype: torch.dtype, sigma: float, flagged: bool) -> None:
    feats_BD, labels_B = clusters(10, 64, 50, sigma)
    found = summary(accumulated(feats_BD.to(dtype), labels_B, 10), only=["nc1", "nc1_floor"])
    assert flagged == (found["nc1"] < 3 * found["nc1_floor"])
    assert len(found["warnings"]) == flagged and all("rounding" in warning for warning in found["warnings"])
    if dtype == torch.float32:
        assert found["nc1_floor"] < 1e-5 * found["nc1"]


def test_summary_warns_where_a_class_has_too_few_samples() -> None:
    found = {}
    for per_class in (4, 4000):
        moments = HalvedMoments(4, 8)
        moments.update(*clusters(4, 8, per_class, 8.0))
        found[per_class] = summary(moments, only=["nc1_split_half"])["warnings"]
    assert found[4000] == [] and "n = 4 a class is too small" in found[4][0]
