"""Ranks of classes against fp64 singular values of the features themselves, and against closed forms."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from nc_dist.nc import spectrum
from nc_dist.nc.spectrum import class_ranks, class_spectrum, numerical_rank, stable_rank
from nc_dist.nc.statistics import Undefined

# Noise spectrum i^-power, rho = tr(Sigma_W)/|mu|^2, and the error of the uncentred numerical rank in fp32.
SPECTRA = [(0.5, 1, 5e-8), (1, 1, 1e-7), (1, 1e-2, 1e-7), (1, 1e-6, 5e-9), (0.5, 1e-8, 5e-10)]


def reference(feats: Tensor) -> tuple[float, float, float, float]:
    """Numerical and stable rank by definition, uncentred, then centred."""
    values = []
    for rows in (feats.double().numpy(), feats.double().numpy() - feats.double().numpy().mean(0)):
        singular = np.linalg.svd(rows, compute_uv=False)
        values += [singular.sum() ** 2 / (singular**2).sum(), (singular**2).sum() / singular.max() ** 2]
    return tuple(values)  # type: ignore[return-value]


def found(feats: Tensor) -> tuple[float, float, float, float]:
    uncentred, centred = class_spectrum(feats)
    return numerical_rank(uncentred), stable_rank(uncentred), numerical_rank(centred), stable_rank(centred)


@lru_cache
def rotation(dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q


def one_class(n: int, dim: int, power: float, rho: float, seed: int = 0) -> Tensor:
    """Features about a mean of norm 1, in fp64."""
    random = torch.Generator().manual_seed(seed)
    variances = torch.arange(1, dim + 1, dtype=torch.float64) ** -power
    mean = torch.nn.functional.normalize(torch.randn(dim, generator=random, dtype=torch.float64), dim=0)
    noise = torch.randn(n, dim, generator=random, dtype=torch.float64) * (rho * variances / variances.sum()).sqrt()
    return mean + noise @ rotation(dim)


@pytest.mark.parametrize(("power", "rho", "error"), SPECTRA)
def test_fp32_features_have_the_ranks_of_their_singular_values_however_far_they_collapsed(
    power: float, rho: float, error: float
) -> None:
    feats = one_class(250, 1024, power, rho).float()
    rank, stable, rank_centred, stable_centred = reference(feats)
    assert found(feats)[0] == pytest.approx(rank, rel=error)
    assert found(feats)[1:] == pytest.approx((stable, rank_centred, stable_centred), rel=1e-6)


@pytest.mark.parametrize(("power", "rho"), [case[:2] for case in SPECTRA])
@pytest.mark.parametrize(("n", "dim"), [(60, 200), (80, 80), (300, 40)])
def test_fp64_features_have_the_ranks_of_their_singular_values_also_with_more_samples_than_dimensions(
    n: int, dim: int, power: float, rho: float
) -> None:
    feats = one_class(n, dim, power, rho)
    assert found(feats) == pytest.approx(reference(feats), rel=1e-9)
    assert [len(eigenvalues) for eigenvalues in class_spectrum(feats)] == [min(n, dim)] * 2


def test_bf16_features_have_the_ranks_of_the_same_numbers_in_fp32() -> None:
    feats = one_class(30, 50, 1, 1e-3).bfloat16()
    for half, full in zip(class_spectrum(feats), class_spectrum(feats.float()), strict=True):
        assert half.dtype == torch.float64 and torch.equal(half, full) and (half.diff() >= 0).all()


def test_the_sum_of_the_eigenvalues_is_the_squared_norm() -> None:
    feats = one_class(40, 30, 1, 0.5)
    uncentred, centred = (float(eigenvalues.sum()) for eigenvalues in class_spectrum(feats))
    assert uncentred == pytest.approx(float(feats.square().sum()), rel=1e-12)
    assert centred == pytest.approx(float((feats - feats.mean(0)).square().sum()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_n_orthonormal_samples_have_rank_n_and_one_less_about_their_mean(dtype: torch.dtype) -> None:
    feats = 3 * rotation(64)[:20].to(dtype)
    assert found(feats) == pytest.approx((20, 20, 19, 19), rel=1e-12 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-4), (torch.float32, 0.03)])
def test_samples_on_a_line_have_rank_1_up_to_the_rounding_of_their_products(dtype: torch.dtype, error: float) -> None:
    along = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert found((along * rotation(512)[0]).to(dtype)) == pytest.approx((1, 1, 1, 1), rel=error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_samples_have_rank_1_and_none_about_their_mean(dtype: torch.dtype) -> None:
    uncentred, centred = class_spectrum(rotation(64)[:1].to(dtype).expand(7, 64))
    assert (numerical_rank(uncentred), stable_rank(uncentred)) == pytest.approx((1, 1), rel=1e-6)
    for rank in (numerical_rank, stable_rank):
        with pytest.raises(Undefined, match="zero"):
            rank(centred)


def test_the_ranks_do_not_depend_on_the_scale_of_the_features() -> None:
    feats = one_class(40, 100, 1, 0.1).float()
    assert found(feats * 2.0**-90) == found(feats) == found(feats * 2.0**70)


def test_no_samples_have_no_spectrum() -> None:
    with pytest.raises(Undefined, match="no samples"):
        class_spectrum(torch.zeros(0, 3))


def classes(*sizes: int, dim: int = 30) -> tuple[Tensor, Tensor]:
    """So many samples of each class, shuffled, fp64."""
    feats = torch.cat([one_class(n, dim, 0.5 + k / 4, 0.3, seed=k) for k, n in enumerate(sizes)])
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return feats[order], labels[order]


def test_ranks_are_means_over_the_classes_that_have_samples() -> None:
    feats, labels = classes(12, 0, 12, 12)
    values = class_ranks(feats, labels, 4, 12)
    expected = np.mean([reference(feats[labels == k]) for k in (0, 2, 3)], axis=0)
    names = ("numerical_rank", "stable_rank", "numerical_rank_centred", "stable_rank_centred")
    assert [values[name] for name in names] == pytest.approx(list(expected), rel=1e-9)
    assert values["numerical_rank_share"] == pytest.approx(expected[2] / 12, rel=1e-9)
    assert (values["rank_n"], values["rank_classes"], values["rank_classes_absent"]) == (12, 3, 1)
    assert values["reasons"] == {}


@pytest.mark.parametrize(("n", "dim"), [(12, 30), (12, 12), (30, 12), (1, 5)])
def test_classes_solved_together_have_the_ranks_that_each_has_alone(n: int, dim: int) -> None:
    feats, labels = classes(n, 0, n, n, n, dim=dim)
    feats[labels == 3] = feats[labels == 3][:1]  # equal samples: none about their mean
    together = spectrum._values(torch.stack([feats[labels == k] for k in (0, 2, 3, 4)]))
    assert together.shape == (4, len(spectrum.METRICS)) and together.dtype == torch.float64
    for k, values in zip((0, 2, 3, 4), together.tolist(), strict=True):
        for number, (rank, spectra) in enumerate((r, s) for s in (0, 1) for r in (numerical_rank, stable_rank)):
            eigenvalues = class_spectrum(feats[labels == k])[spectra]
            expected = rank(eigenvalues) if eigenvalues.any() else 0
            assert values[number] == pytest.approx(expected, rel=1e-12)
        assert values[4] == values[2] / min(n, dim)
        assert (values[2] == 0) == (k == 3 or n == 1)


@pytest.mark.parametrize(("chunk_bytes", "solved"), [(1, [1, 1, 1, 1, 1]), (2 * 32 * (12 * 30 + 144), [2, 2, 1])])
def test_classes_are_solved_together_as_far_as_the_memory_allows(
    chunk_bytes: int, solved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    feats, labels = classes(12, 12, 12, 0, 12, 12)
    at_once = class_ranks(feats, labels, 6, 12)
    sizes, values = list[int](), spectrum._values
    monkeypatch.setattr(spectrum, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(spectrum, "_values", lambda feats_CnD: sizes.append(len(feats_CnD)) or values(feats_CnD))
    found = class_ranks(feats, labels, 6, 12)
    assert sizes == solved
    assert {**found, "reasons": 0} == pytest.approx({**at_once, "reasons": 0}, rel=1e-12)


def test_the_share_is_of_the_dimensions_where_these_are_fewer() -> None:
    values = class_ranks(*classes(12, 12, dim=5), 2, 12)
    assert values["numerical_rank_share"] == pytest.approx(values["numerical_rank_centred"] / 5, rel=1e-12)  # type: ignore[operator]


def test_a_class_with_another_number_of_samples_is_named() -> None:
    with pytest.raises(ValueError, match="per_class=12: class 2 has 11 samples"):
        class_ranks(*classes(12, 0, 11), 3, 12)
    with pytest.raises(ValueError, match="per_class=0"):
        class_ranks(*classes(0, 0), 2, 0)


def test_one_sample_a_class_has_no_rank_about_its_mean() -> None:
    values = class_ranks(*classes(1, 1, 1), 3, 1)
    assert (values["numerical_rank"], values["stable_rank"]) == pytest.approx((1, 1), rel=1e-12)
    without = {"numerical_rank_centred", "stable_rank_centred", "numerical_rank_share"}
    assert {name for name, value in values.items() if value is None} == without
    assert values["reasons"] == dict.fromkeys(
        without, "all features less their mean are zero (n = 1) in 3 of 3 classes, the first is class 0"
    )


def test_a_dead_class_is_not_left_out_in_silence() -> None:
    feats, labels = classes(6, 6, 6)
    values = class_ranks(torch.where(labels[:, None] == 1, 0, feats), labels, 3, 6)
    assert values["numerical_rank"] is None and values["numerical_rank_centred"] is None
    assert values["reasons"]["stable_rank"].endswith("are zero (n = 6) in 1 of 3 classes, the first is class 1")  # type: ignore[index,union-attr,call-overload]


def test_without_any_sample_nothing_has_a_value() -> None:
    values = class_ranks(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 3, 5)
    assert values["rank_classes_absent"] == 3 and set(values["reasons"].values()) == {"no samples"}  # type: ignore[union-attr]
    assert len(values["reasons"]) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("feats", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 2]), r"labels 0\.\.2: expected 0\.\.1"),
        (torch.zeros(2, 3), torch.tensor([-1, 1]), r"labels -1\.\.1"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "expected 2 integers"),
        (torch.zeros(2, 3), torch.tensor([0]), "expected 2 integers"),
        (torch.zeros(2), torch.tensor([0, 1]), r"shape \(N, D\)"),
        (torch.tensor([[0.0], [torch.nan]]), torch.tensor([0, 1]), "expected finite"),
    ],
)
def test_features_and_labels_that_do_not_fit_are_refused(feats: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_ranks(feats, labels, 2, 1)
