"""What class moments take, keep and refuse, and that neither autocast nor inference mode is felt.

Letters: B samples, K classes, D dimensions.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from nc_reference import accumulated, assert_same, fields, randn, same_bits, scattered, two_pass

from nc_dist.nc import ClassMoments, HalvedMoments, NotFinite
from nc_dist.nc.variability import nc1

LABELS = torch.tensor([0, 1])
BAD = [
    (torch.ones(2, 4), torch.tensor([0, 3]), r"label 3 is outside 0\.\.2.*1 of 2 labels"),
    (torch.ones(2, 4), torch.tensor([-1, 0]), r"label -1 is outside 0\.\.2"),
    (torch.ones(2, 5), LABELS, r"features are \(2, 5\) torch.float32: expected floating point, \(B, 4\)"),
    (torch.ones(4), LABELS, r"features are \(4,\)"),
    (torch.ones(2, 4, dtype=torch.int64), LABELS, "torch.int64: expected floating"),
    (torch.ones(2, 4, dtype=torch.complex64), LABELS, "torch.complex64: expected floating"),
    (torch.ones(2, 4), torch.tensor([0, 1, 2]), r"labels are \(3,\) torch.int64: expected integers, \(2,\)"),
    (torch.ones(2, 4), torch.tensor([[0], [1]]), r"labels are \(2, 1\)"),
    (torch.ones(2, 4), torch.tensor([0.0, 1.0]), "torch.float32: expected integers"),
    (torch.ones(2, 4), torch.tensor([True, False]), "torch.bool: expected integers"),
    (torch.tensor([[0, 0, 0, 0], [1, 2, torch.nan, 3]]), LABELS, r"not finite in 1 of 2 .* sample 1 .*\(label 1\)"),
    (torch.tensor([[0, -torch.inf, 0, 0], [0, 0, torch.inf, 0]]), LABELS, "not finite in 2 of 2 .* sample 0"),
    (torch.tensor([[0, 0, 0, 0], [0, 0, 0, -3e19]]), LABELS, r"above 1e\+17 overflow torch.float32 products"),
]


@pytest.mark.parametrize("kind", [ClassMoments, HalvedMoments])
@pytest.mark.parametrize(("feats", "labels", "message"), BAD)
def test_wrong_input_is_refused_with_its_values_and_nothing_added(kind, feats, labels, message) -> None:
    moments = kind(3, 4)
    parts = (moments.first, moments.second) if kind is HalvedMoments else (moments,)
    moments.update(*scattered(0, 20, 3, 4))
    before = [part.state_dict() for part in parts]
    with pytest.raises(ValueError, match=message):
        moments.update(feats, labels)
    assert all(same_bits(state, part.state_dict()) for state, part in zip(before, parts, strict=True))


def test_features_that_are_not_finite_say_which_row() -> None:
    feats_BD = torch.ones(6, 4)
    feats_BD[[3, 5], 1] = torch.nan
    with pytest.raises(NotFinite) as found:
        ClassMoments(3, 4).update(feats_BD, torch.arange(6) % 3)
    assert found.value.row == 3


def test_large_fp64_features_are_taken_in_fp64_alone() -> None:
    feats_BD, labels_B = scattered(0, 30, 3, 4)
    moments = accumulated(1e40 * feats_BD, labels_B, 3, dtype=torch.float64)
    assert nc1(moments) == pytest.approx(nc1(accumulated(feats_BD, labels_B, 3, dtype=torch.float64)), rel=1e-12)
    with pytest.raises(ValueError, match="overflow torch.float32 products: rescale"):
        accumulated(1e40 * feats_BD, labels_B, 3)
    with pytest.raises(ValueError, match="overflow torch.float64 products"):
        accumulated(1e160 * feats_BD, labels_B, 3, dtype=torch.float64)


def test_moments_of_other_sizes_do_not_merge() -> None:
    first = accumulated(*scattered(0, 20, 3, 4), 3)
    before = first.state_dict()
    for other in (
        ClassMoments(3, 5),
        ClassMoments(2, 4),
        ClassMoments(3, 4, blocks=1),
        ClassMoments(3, 4, dtype=torch.float64),
    ):
        expected = (
            rf"\(3, 4, 8, torch.float32\) with \({other.num_classes}, {other.dim}, {other.blocks}, {other.dtype}\)"
        )
        with pytest.raises(ValueError, match=expected):
            first.merge(other)
    assert same_bits(before, first.state_dict())


@pytest.mark.parametrize(
    "options", [{"num_classes": 0}, {"dim": 0}, {"blocks": 0}, {"dtype": torch.bfloat16}, {"dtype": torch.int64}]
)
def test_impossible_sizes_are_refused(options) -> None:
    with pytest.raises(ValueError, match="at least 1, dtype float32 or float64"):
        ClassMoments(**{"num_classes": 3, "dim": 4, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_features_of_any_type_are_summed_without_further_rounding(dtype, precision) -> None:
    feats_BD, labels_B = scattered(5, 500, 4, 32)
    feats_BD = feats_BD.to(dtype).requires_grad_()
    stats = accumulated(feats_BD, labels_B, 4, batch=100, dtype=precision).statistics()
    assert not stats.scatter_DD.requires_grad
    assert_same(stats, two_pass(feats_BD, labels_B, 4), {torch.float32: 1e-6, torch.float64: 1e-12}[precision])


@pytest.mark.parametrize("kind", [ClassMoments, HalvedMoments])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_give_the_same_bits(kind, dtype) -> None:
    feats_BD, labels_B = scattered(6, 50, 4, 8)
    found, expected = kind(4, 8), kind(4, 8)
    found.update(feats_BD, labels_B.to(dtype))
    expected.update(feats_BD, labels_B)
    assert same_bits(fields(found.statistics()), fields(expected.statistics()))


def test_an_empty_batch_adds_nothing() -> None:
    moments = accumulated(*scattered(9, 20, 3, 4), 3)
    before = moments.state_dict()
    moments.update(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    assert same_bits(before, moments.state_dict())


def measured(feats_BD, labels_B) -> tuple[dict[str, torch.Tensor], float]:
    """Through all that multiplies matrices."""
    rows = slice(0, 100), slice(100, None)
    first, second = (accumulated(feats_BD[part], labels_B[part], 4, batch=50) for part in rows)
    stats = first.merge(second).all_reduce(lambda tensor: tensor).statistics()
    return fields(stats), nc1(stats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_changes_no_bit(dtype) -> None:
    feats_BD, labels_B = scattered(5, 300, 4, 150)
    feats_BD = feats_BD.to(dtype)
    expected = measured(feats_BD, labels_B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measured(feats_BD, labels_B)
    assert same_bits(found[0], expected[0]) and found[1] == expected[1]


def test_inference_mode_changes_no_bit() -> None:
    feats_BD, labels_B = scattered(5, 300, 4, 150)
    expected = measured(feats_BD, labels_B)
    with torch.inference_mode():
        found = measured(feats_BD, labels_B)
    assert same_bits(found[0], expected[0]) and found[1] == expected[1]


@pytest.mark.parametrize("inside", [{"made", "merged"}, {0}, {100}, {"merged"}])
def test_what_was_made_inside_inference_mode_goes_on_outside(inside) -> None:
    """An evaluation loop in inference mode, whose moments are read, merged or continued after it."""
    feats_BD, labels_B = scattered(5, 300, 4, 150)
    with torch.inference_mode("made" in inside):
        moments = ClassMoments(4, 150)
    for low in (0, 100):
        with torch.inference_mode(low in inside):
            moments.update(feats_BD[low : low + 100], labels_B[low : low + 100])
    with torch.inference_mode("merged" in inside):
        moments = moments.merge(ClassMoments(4, 150))
    moments.update(feats_BD[200:], labels_B[200:])
    assert_same(moments.statistics(), two_pass(feats_BD, labels_B, 4), 1e-6)


def test_nc1_does_not_feel_scale_rotation_or_offset() -> None:
    feats_BD, labels_B = scattered(5, 200, 5, 16)
    value = nc1(accumulated(feats_BD, labels_B, 5, dtype=torch.float64))
    turned_BD = 1e-6 * feats_BD @ torch.linalg.qr(randn(7, 16, 16)).Q + 1e-4
    assert nc1(accumulated(turned_BD, labels_B, 5, dtype=torch.float64)) == pytest.approx(value, rel=1e-9)


def test_state_dict_round_trip_is_bitwise_and_independent() -> None:
    feats_BD, labels_B = scattered(8, 60, 5, 200)
    moments = accumulated(feats_BD[:40], labels_B[:40], 5, blocks=2)
    state = moments.state_dict()
    copy = ClassMoments.from_state_dict(state)
    for each in (moments, copy):
        each.update(feats_BD[40:], labels_B[40:])
    assert copy.n_K.sum() == 60 and state["n_K"].sum() == 40
    assert same_bits(copy.state_dict(), moments.state_dict())


def test_damaged_state_is_refused() -> None:
    state = ClassMoments(3, 4).state_dict()
    with pytest.raises(ValueError, match="n_K is"):
        ClassMoments.from_state_dict({**state, "n_K": torch.zeros(2, dtype=torch.float64)})
    with pytest.raises(ValueError, match="squares_K is"):
        ClassMoments.from_state_dict({**state, "squares_K": state["squares_K"].float()})
    with pytest.raises(ValueError, match="products is"):
        ClassMoments.from_state_dict({**state, "products": torch.zeros(15, dtype=torch.float64)})
    with pytest.raises(ValueError, match="expected"):
        ClassMoments.from_state_dict({name: value for name, value in state.items() if name != "sums_KD"})


def test_importing_nc_needs_torch_alone() -> None:
    code = (
        "import sys, nc_dist.nc; "
        "banned = 'ray deepspeed webdataset tensorboard pydantic nc_dist.world nc_dist.spec'.split(); "
        "print([name for name in banned if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
