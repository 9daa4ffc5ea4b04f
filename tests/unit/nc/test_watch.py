"""nc.watch in one process: it measures what was there, changes nothing, and refuses what it cannot know."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nc_dist.nc import HalvedMoments, NotFinite, SecondPass, combined, summary, watch

CLASSES, BATCHES = 4, (16, 16, 5)


def small_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)  # of (B, 3, 6, 6); `act` works in place on what `norm` gave
    parts = {"conv": nn.Conv2d(3, 12, 3), "norm": nn.BatchNorm2d(12), "act": nn.ReLU(inplace=True)}
    parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(12, CLASSES)}
    return nn.Sequential(OrderedDict(parts)).to(dtype)


def batches(dtype: torch.dtype = torch.float32, *shape: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    centres = torch.randn(CLASSES, *(shape or (3, 6, 6)), generator=random)
    labels = [torch.randint(CLASSES, (size,), generator=random) for size in BATCHES]
    return [((centres[y] + torch.randn(centres[y].shape, generator=random)).to(dtype), y) for y in labels]


def watched(model: nn.Module, layers: list[str], data: list[tuple[Tensor, Tensor]], **options: Any) -> dict[str, Any]:
    with watch(model, layers, CLASSES, **options) as w:
        for x, y in data:
            model(x)
            w.update(y)
    return w.metrics()


def by_hand(feats: list[Tensor], labels: list[Tensor], classifier: Any = None) -> dict[str, Any]:
    """Summary and second pass of features (B, D) that were taken without hooks."""
    moments = HalvedMoments(CLASSES, feats[0].shape[1], dtype=torch.float64)
    for each, y in zip(feats, labels, strict=True):
        moments.update(each, y)
    second = SecondPass(moments, classifier)
    for each, y in zip(feats, labels, strict=True):
        second.update(each, y)
    return combined(summary(moments, *(classifier or (None, None))), second.metrics(lambda tensor: tensor))


def assert_same(found: dict[str, Any], expected: dict[str, Any], pooling: str) -> None:
    assert found["pooling"] == pooling and found["reasons"].keys() == expected["reasons"].keys()
    assert found.keys() == {*expected, "pooling"} and found["nc1"] is not None
    for name, value in expected.items():
        if name != "reasons":
            close = isinstance(value, float | list) and name != "warnings"
            assert found[name] == (pytest.approx(value, rel=1e-9) if close else value), name


@torch.no_grad()
def test_metrics_are_those_of_features_taken_by_hand() -> None:
    net, data = small_net().eval(), batches()
    found = watched(net, ["norm", "input:fc", "fc"], data)
    labels = [y for _, y in data]
    maps = [net.norm(net.conv(x)) for x, _ in data]  # before the activation overwrites them
    entering = [each.relu().mean((2, 3)) for each in maps]
    assert_same(found["norm"], by_hand([each.mean((2, 3)) for each in maps], labels), "average")
    assert_same(found["input:fc"], by_hand(entering, labels, (net.fc.weight, net.fc.bias)), "none")
    assert_same(found["fc"], by_hand([net.fc(each) for each in entering], labels), "none")
    assert found["input:fc"]["nc3_papyan"] is not None and found["fc"]["nc3_papyan"] is None
    assert "input:NAME" in found["fc"]["reasons"]["nc4"]


@torch.no_grad()
def test_nc1_and_both_choices_of_class_are_those_of_a_plain_two_pass_computation() -> None:
    net, data = small_net(torch.float64).eval(), batches(torch.float64)
    found = watched(net, ["input:fc"], data)["input:fc"]
    feats, labels = torch.cat([net[:5](x) for x, _ in data]), torch.cat([y for _, y in data])
    means = torch.stack([feats[labels == k].mean(0) for k in range(CLASSES)])
    within = (feats - means[labels]).T @ (feats - means[labels]) / len(feats)
    between = (means - feats.mean(0)).T @ (means - feats.mean(0)) / CLASSES
    nearest = torch.cdist(feats, means).argmin(1)
    assert found["nc1"] == pytest.approx(float((within @ torch.linalg.pinv(between)).trace()) / CLASSES, rel=1e-9)
    assert found["ncc_acc1"] == float((nearest == labels).double().mean())
    assert found["nc4"] == float((nearest == net.fc(feats).argmax(1)).double().mean())
    assert found["N"] == sum(BATCHES)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_features_keep_their_type_and_with_it_their_floor(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    net, data = small_net(dtype).eval(), batches(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = watched(net, ["conv"], data)["conv"]
        found = [net.conv(x).mean((2, 3)) for x, _ in data]
    assert found[0].dtype == torch.bfloat16
    assert_same(values, by_hand(found, [y for _, y in data]), "average")
    exact = by_hand([each.float() for each in found], [y for _, y in data])
    assert values["nc1_floor"] == pytest.approx(4.0**16 * exact["nc1_floor"])  # 16 mantissa bits fewer


def trained(net: nn.Module, watching: bool) -> tuple[list[Tensor], Tensor]:
    """Parameters after a few steps with dropout, and the state of the random numbers."""
    torch.manual_seed(3)
    model, data = nn.Sequential(OrderedDict(net=net, drop=nn.Dropout(0.2))), batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    w = watch(model, ["net.norm", "input:net.fc", "drop"], CLASSES)
    for x, y in data:
        with w if watching else nullcontext():
            loss = nn.functional.cross_entropy(model(x), y)
            if watching:
                w.update(y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*(p.detach() for p in model.parameters()), *model.buffers()], torch.get_rng_state()


def test_training_is_bit_for_bit_what_it_is_unwatched() -> None:
    (plain, plain_rng), (seen, seen_rng) = trained(small_net(), False), trained(small_net(), True)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True)) and torch.equal(plain_rng, seen_rng)


def test_no_graph_and_no_activation_is_kept_alive() -> None:
    net, (x, y) = small_net(), batches()[0]
    held: list[weakref.ref[Tensor]] = []
    net.conv.register_forward_hook(lambda module, args, out: held.append(weakref.ref(out)))
    with watch(net, ["conv", "input:fc", "fc"], CLASSES) as w:
        net(x)  # nobody holds the output
        assert held[0]() is None
        w.update(y)
        assert not any(feats.requires_grad for _, kept in w._batches for feats in kept.values())
        assert w.cache_bytes == 4 * len(y) * (12 + 12 + CLASSES) + 8 * len(y)


def number_of_hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_hooks_are_gone_after_the_block_and_after_an_exception() -> None:
    net, (x, y) = small_net(), batches()[0]
    with watch(net, ["conv", "input:fc"], CLASSES) as w:
        assert number_of_hooks(net) == 2
        net(x)
        w.update(y)
    assert number_of_hooks(net) == 0
    with pytest.raises(KeyError, match="the loop's own"), w:
        net(x)
        raise KeyError("the loop's own")
    assert number_of_hooks(net) == 0
    net(x)
    with w:
        net(x)
        w.update(y)
    assert w.metrics()["conv"]["N"] == 2 * len(y)


def test_each_layer_is_pooled_as_asked_and_says_how() -> None:
    data = batches(torch.float32, 7, 12)
    labels, net = [y for _, y in data], nn.Sequential(nn.Identity(), nn.Identity())
    found = watched(net, ["0", "input:1"], data, pooling={"input:1": "cls"})
    assert_same(found["0"], by_hand([x.mean(1) for x, _ in data], labels), "average")
    assert_same(found["input:1"], by_hand([x[:, 0] for x, _ in data], labels), "cls")
    with pytest.raises(ValueError, match="not watched"):
        watch(net, ["input:1"], CLASSES, pooling={"1": "cls"})
    with pytest.raises(ValueError, match=r"^0: .*'last'"):
        watched(net, ["0"], data, pooling={"0": "last"})
    assert number_of_hooks(net) == 0


def test_an_input_that_is_given_by_name_is_seen() -> None:
    block, data = nn.Identity(), batches(torch.float32, 12)
    with watch(nn.ModuleList([block]), ["input:0", "0"], CLASSES) as w:
        for x, y in data:
            block(input=x)
            w.update(y)
    found = w.metrics()
    assert found["0"]["nc1"] == found["input:0"]["nc1"] and found["0"]["N"] == sum(BATCHES)


def test_nothing_is_dropped_or_counted_twice() -> None:
    net, (x, y) = small_net(), batches()[0]
    with watch(net, ["conv", "input:fc"], CLASSES) as w:
        with pytest.raises(ValueError, match=r"without a forward of \['conv', 'input:fc'\]"):
            w.update(y)
        net(x)
        with pytest.raises(ValueError, match="conv ran again before update"):
            net(x)
        w.update(y)
        with pytest.raises(ValueError, match="without a forward"):
            w.update(y)
        net.conv(x)
        with pytest.raises(ValueError, match=r"without a forward of \['input:fc'\]"):
            w.update(y)
    assert w.metrics()["input:fc"]["N"] == len(y)
    with pytest.raises(ValueError, match="no update"), watch(net, ["conv"], CLASSES):
        net(x)


def test_a_batch_with_nan_is_in_no_layer_and_the_next_one_goes_on() -> None:
    net, data = small_net().eval(), batches()
    with watch(net, ["conv", "input:fc"], CLASSES) as w:
        for x, y in data:
            net(x)
            w.update(y)
        before, size = w.metrics(), w.cache_bytes
        hook = net.pool.register_forward_hook(lambda module, args, out: out.index_fill(0, torch.tensor([3]), torch.nan))
        net(data[0][0])
        with pytest.raises(NotFinite, match=r"^input:fc: .*sample 3 ") as caught:
            w.update(data[0][1])
        assert caught.value.row == 3
        hook.remove()
        assert w.metrics() == before and w.cache_bytes == size
        net(data[0][0])
        w.update(data[0][1])
    assert w.metrics()["conv"]["N"] == sum(BATCHES) + BATCHES[0]


def test_a_refused_first_batch_leaves_nothing_behind() -> None:
    net, (x, y) = small_net(), batches()[0]
    with watch(net, ["conv"], CLASSES) as w:
        for labels, why in ((y + 1, "num_classes"), (y[:-1], "one for each sample"), (y.float(), "integers")):
            net(x)
            with pytest.raises(ValueError, match=f"^conv: .*{why}"):
                w.update(labels)
        net(x[:0])
        w.update(y[:0])
        with pytest.raises(ValueError, match="no rank has seen a sample"):
            w.metrics()
        net(x)
        w.update(y.to(torch.uint8))
    assert w.metrics() == watched(net, ["conv"], [(x, y)])


def test_labels_may_be_lists_and_arrays_and_what_is_neither_is_refused() -> None:
    net, data = small_net().eval(), batches()
    with watch(net, ["conv", "input:fc"], CLASSES) as w:
        for (x, y), kind in zip(data, (list, Tensor.tolist, Tensor.numpy), strict=True):
            net(x)
            w.update(kind(y))
        net(data[0][0])
        with pytest.raises(ValueError, match="labels list .*expected integers"):
            w.update(["cat"] * BATCHES[0])  # type: ignore[list-item]
    assert w.metrics() == watched(net, ["conv", "input:fc"], data)


def test_one_layer_that_is_no_list_is_refused() -> None:
    with pytest.raises(ValueError, match="layers='conv': give a list"):
        watch(small_net(), "conv", CLASSES)


def test_the_statistics_of_a_layer_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, whole = [], HalvedMoments.whole
    monkeypatch.setattr(HalvedMoments, "whole", lambda halved: made.append(halved) or whole(halved))
    watched(small_net().eval(), ["conv", "input:fc"], batches())
    assert len(made) == 2


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_metrics_are_the_same_in_every_grad_mode_and_read_outside_of_it(mode: Any) -> None:
    net, data = small_net().eval(), batches()
    with watch(net, ["conv", "input:fc"], CLASSES) as w:
        for number, (x, y) in enumerate(data):
            with mode() if number < 2 else torch.no_grad():  # as in a loop whose parts differ
                net(x)
                w.update(y)
    assert w.metrics() == watched(net, ["conv", "input:fc"], data)


@pytest.mark.parametrize("update_first", [True, False])
def test_a_forward_that_checkpointing_runs_again_does_not_count(update_first: bool) -> None:
    net, (x, y) = small_net(), batches()[0]
    with watch(net, ["conv", "input:fc"], CLASSES) as w:
        for _ in range(2):
            loss = nn.functional.cross_entropy(checkpoint(net, x, use_reentrant=False), y)
            if update_first:
                w.update(y)
            loss.backward()
            if not update_first:
                w.update(y)
    assert w.metrics()["conv"]["N"] == 2 * len(y)


def test_without_a_cache_what_needs_a_second_look_is_none_with_the_reason() -> None:
    net, data = small_net().eval(), batches()
    kept = watched(net, ["conv", "input:fc"], data)
    with watch(net, ["conv", "input:fc"], CLASSES, cache=False) as w:
        for x, y in data:
            net(x)
            w.update(y)
    assert w.cache_bytes == 0
    for layer, found in w.metrics().items():
        assert found.keys() == kept[layer].keys()
        differ = {name for name in found if found[name] != kept[layer][name]} - {"reasons"}
        assert {"ncc_acc1", "nc1_per_class", "nc1_balanced"} <= differ
        assert all(found[name] is None and "second" in found["reasons"][name] for name in differ)
    assert w.metrics()["input:fc"]["nc3_papyan"] == kept["input:fc"]["nc3_papyan"] is not None


def test_a_classifier_is_taken_where_it_acts_or_where_it_is_given() -> None:
    net, data = small_net().eval(), batches()
    weight, bias = net.fc.weight.detach().clone(), net.fc.bias.detach().clone()
    with watch(net, ["pool", "input:fc"], CLASSES) as w:
        for x, y in data:
            net(x)
            w.update(y)
    expected = w.metrics()
    net.fc.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    gone = w.metrics()
    assert gone["input:fc"]["nc4"] is None and "partitioned" in gone["input:fc"]["reasons"]["nc3_zhu"]
    assert gone["input:fc"]["nc1"] == expected["input:fc"]["nc1"]
    assert w.metrics(classifier=(weight, bias)) == expected
    without = w.metrics((weight, None))["input:fc"]
    assert {name for name in without if without[name] != expected["input:fc"][name]} - {"nc4"} == {"nc3_bias"}
    for wrong in ((weight.T, bias), (weight, bias[1:])):
        with pytest.raises(ValueError, match="expected finite values, of shape"):
            w.metrics(wrong)
    with (
        watch(net, ["input:pool", "input:fc"], CLASSES) as w,
        pytest.raises(ValueError, match="the one `input:` layer"),
    ):
        w.metrics((weight, bias))
