"""What nc.watch knows of a layer: its module by name, how what passes there becomes features, and its classifier."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nc_dist.nc.watched import as_labels, classifier_at, pooled, submodules


def net() -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 6, 3), flat=nn.Flatten(), fc=nn.Linear(6, 4)))


def wrapped(module: nn.Module, times: int) -> nn.Module:
    return wrapped(nn.ModuleDict({"module": module}), times - 1) if times else module


@pytest.mark.parametrize("times", [0, 1, 3])
def test_names_are_found_inside_wrappers_however_many(times: int) -> None:
    inner = net()
    assert submodules(wrapped(inner, times), ["input:fc", "conv"]) == {"input:fc": inner.fc, "conv": inner.conv}


def test_names_are_found_in_a_compiled_net() -> None:
    inner = net()
    assert submodules(nn.ModuleDict({"_orig_mod": wrapped(inner, 1)}), ["conv"]) == {"conv": inner.conv}


def test_names_from_the_outside_and_a_part_that_is_called_module_are_taken_at_their_word() -> None:
    inner = net()
    assert submodules(wrapped(inner, 1), ["module.conv"]) == {"module.conv": inner.conv}
    assert submodules(wrapped(inner, 1), ["module"]) == {"module": inner}


def test_a_module_with_two_names_is_found_by_both() -> None:
    shared = nn.Linear(3, 3)
    assert submodules(nn.ModuleDict({"a": shared, "b": shared}), ["b", "a"]) == {"b": shared, "a": shared}


@pytest.mark.parametrize("times", [0, 2])
def test_unknown_names_are_refused_with_the_nearest_ones(times: int) -> None:
    with pytest.raises(ValueError, match=r"no submodules \['cnov'\].*\['conv'"):
        submodules(wrapped(net(), times), ["fc", "input:cnov"])
    with pytest.raises(ValueError, match=r"layers=\[\].*'flat'"):
        submodules(wrapped(net(), times), [])


def test_one_name_instead_of_a_list_is_refused_with_the_list_it_should_be() -> None:
    with pytest.raises(ValueError, match=r"layers='fc': give a list of names, \['fc'\]"):
        submodules(net(), "fc")


def test_labels_of_any_kind_become_a_tensor() -> None:
    labels = torch.tensor([2, 0, 1])
    assert as_labels(labels) is labels
    for given in ([2, 0, 1], (2, 0, 1), list(labels), labels.numpy()):
        found = as_labels(given)
        assert found.dtype == torch.int64 and found.equal(labels)


@pytest.mark.parametrize("labels", [None, "cat", ["cat", "dog"], [[1], [1, 2]], {0: 1}, object()])
def test_what_is_no_labels_is_refused(labels: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"^labels {type(labels).__name__} .*: expected integers, one for each sample"
    ):
        as_labels(labels)


MAP, SEQUENCE, ROWS = torch.rand(5, 6, 4, 3), torch.rand(5, 7, 6), torch.rand(5, 6)


@pytest.mark.parametrize(
    ("value", "asked", "expected", "pooling"),
    [
        (MAP, None, MAP.flatten(2).mean(2), "average"),
        (MAP, "channels_last", MAP.flatten(1, 2).mean(1), "channels_last"),
        (SEQUENCE, None, SEQUENCE.mean(1), "average"),
        (SEQUENCE, "cls", SEQUENCE[:, 0], "cls"),
        (ROWS, None, ROWS, "none"),
        ((ROWS.argmax(1), None, ROWS, ROWS + 1), None, ROWS, "none"),
        (OrderedDict(ids=ROWS.argmax(1), last=ROWS, first=ROWS + 1), None, ROWS, "none"),
    ],
)
def test_features_are_one_row_a_sample_and_a_copy(value: Any, asked: Any, expected: Tensor, pooling: str) -> None:
    feats, how = pooled("block", value, asked)
    torch.testing.assert_close(feats, expected)
    assert how == pooling and feats.untyped_storage().data_ptr() != expected.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [MAP, SEQUENCE, ROWS])
def test_features_keep_their_type(value: Tensor, dtype: torch.dtype) -> None:
    assert pooled("block", value.to(dtype), None)[0].dtype == dtype


@pytest.mark.parametrize(
    ("value", "asked", "why"),
    [
        (ROWS[:, 0], None, r"\(5,\)"),
        (MAP[..., None], None, r"\(5, 6, 4, 3, 1\)"),
        ({"ids": ROWS.argmax(1)}, None, "of dict"),
        (MAP, "cls", r"\(5, 6, 4, 3\) .*'cls'"),
        (ROWS, "cls", r"\(5, 6\) .*'cls'"),
        (SEQUENCE, "last", r"\(5, 7, 6\) .*'last'"),
        (torch.rand(5, 4, 4, 6), None, r"\(5, 4, 4, 6\) looks like .*pooling={'block': 'channels_last'}"),
    ],
)
def test_what_cannot_be_pooled_is_refused_with_layer_and_shape(value: Any, asked: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"^block: .*{why}"):
        pooled("block", value, asked)


def test_a_map_that_looks_otherwise_is_taken_at_the_word_of_its_pooling() -> None:
    assert pooled("block", torch.rand(5, 4, 4, 6), "channels_last")[0].shape == (5, 6)
    assert pooled("block", torch.rand(5, 4, 4, 6), "average")[0].shape == (5, 4)


def test_the_classifier_is_the_linear_that_takes_these_very_features() -> None:
    fc, like = net().fc, torch.zeros(4, 6, dtype=torch.float64)
    weight, bias = classifier_at("input:fc", fc, like, None)
    assert torch.equal(weight, fc.weight) and torch.equal(bias, fc.bias)
    assert classifier_at("input:fc", nn.Linear(6, 4, bias=False), like, None)[1] is None


@pytest.mark.parametrize(
    ("layer", "module", "why"),
    [
        ("fc", nn.Linear(6, 4), "watch input:NAME"),
        (
            "input:fc",
            nn.Linear(6, 5),
            r"Linear(in_features=6, out_features=5, bias=True) is no Linear of 6 features to 4",
        ),
        ("input:fc", nn.Linear(3, 4), r"Linear(in_features=3"),
        ("input:fc", nn.Flatten(), "Flatten("),
    ],
)
def test_where_no_classifier_is_known_it_says_why(layer: str, module: nn.Module, why: str) -> None:
    found = classifier_at(layer, module, torch.zeros(4, 6), None)
    assert isinstance(found, str) and why in found


def test_a_partitioned_weight_is_said_so_and_one_that_is_given_takes_its_place() -> None:
    fc, like = nn.Linear(6, 4), torch.zeros(4, 6)
    given = fc.weight.detach().clone(), None
    fc.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    assert "partitioned" in classifier_at("input:fc", fc, like, None)
    assert torch.equal(classifier_at("input:fc", fc, like, given)[0], given[0])
    assert isinstance(classifier_at("fc", fc, like, given), str)
