"""Weights of any origin: found however they are nested and prefixed, refused when they do not fit or could run code."""

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nc_dist.errors import InputError
from nc_dist.weights import fit_weights, load_weights, match_weights, read_weights, weights_identity

State = dict[str, Tensor]


class Net(nn.Module):
    """Convolution, BatchNorm and a classifier: every kind of tensor that there is."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3)
        self.bn1 = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, classes)


def drawn(seed: int, classes: int = 4) -> State:
    torch.manual_seed(seed)
    net = Net(classes)
    nn.init.uniform_(net.bn1.running_mean)  # type: ignore[arg-type]
    return net.state_dict()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "module.encoder_q.", "backbone.", "_orig_mod.", "module.model.", "a.b.c.fc.", "_orig_mod.module."],
)
def test_any_prefix_is_found_and_stripped(prefix: str, tmp_path: Path) -> None:
    state, net = drawn(1), Net()
    torch.save(prefixed(state, prefix), tmp_path / "w.pth")
    match = load_weights(net, tmp_path / "w.pth")
    assert match.prefix == prefix and match.matched == tuple(state)
    assert not match.missing and not match.unexpected and not match.wrong_shape
    assert same(net.state_dict(), state)


def test_of_several_encoders_the_one_that_fits_best_is_taken_and_of_equal_ones_the_first() -> None:
    q, k = drawn(1), drawn(2)
    moco = {**prefixed(q, "module.encoder_q."), **prefixed(k, "module.encoder_k."), "module.queue": torch.zeros(9)}
    match = match_weights(moco, Net())
    assert match.prefix == "module.encoder_q." and len(match.unexpected) == len(k) + 1
    del moco["module.encoder_q.conv1.weight"]
    assert match_weights(moco, Net()).prefix == "module.encoder_k."
    outside = {**prefixed(q, "backbone."), "fc.weight": torch.zeros(4, 5), "fc.bias": torch.zeros(4)}
    assert match_weights(outside, Net()).prefix == "backbone."


def test_a_prefix_is_chosen_by_shapes_not_by_names_alone() -> None:
    wide = {name: torch.zeros(7, 7, 7) for name in drawn(1)}
    assert match_weights({**prefixed(wide, "big."), **prefixed(drawn(2), "small.")}, Net()).prefix == "small."


NESTED: dict[str, Callable[[State, State], Any]] = {
    "bare": lambda right, other: right,
    "state_dict": lambda right, other: {"epoch": 3, "state_dict": right, "arch": "resnet50"},
    "model, before its average": lambda right, other: {
        "model_ema": {**prefixed(other, "module."), "n_averaged": torch.tensor(3)},
        "model": right,
    },
    "teacher, not student": lambda right, other: {"student": other, "teacher": right, "args": argparse.Namespace(lr=1)},
    "module in model": lambda right, other: {"model": {"module": right}, "step": torch.tensor(7)},
    "beside an optimizer": lambda right, other: {
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "net": right,
    },
    "unknown keys": lambda right, other: {"projector": {"w": torch.zeros(2)}, "deep": {"er": right}},
    "longer than a preferred one": lambda right, other: {"model": {"scale": torch.zeros(1)}, "weights": right},
}


@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".tar", ".ckpt"])
def test_the_state_dict_is_found_however_a_file_nests_it(nested: str, suffix: str, tmp_path: Path) -> None:
    right = drawn(1)
    path = tmp_path / f"w{suffix}"
    torch.save(NESTED[nested](right, drawn(2)), path, _use_new_zipfile_serialization=suffix != ".tar")
    assert same(read_weights(path), right)


def test_safetensors_are_read_and_half_precision_is_loaded_into_the_nets_own(tmp_path: Path) -> None:
    state, net = {name: value.half() if value.is_floating_point() else value for name, value in drawn(1).items()}, Net()
    save_file(state, tmp_path / "w.safetensors")
    load_weights(net, tmp_path / "w.safetensors")
    assert net.conv1.weight.dtype == torch.float32 and net.conv1.weight.equal(state["conv1.weight"].float())


@pytest.mark.parametrize(
    "content, said",
    [
        ({"epoch": 3, "lr": {"a": 1}}, r"no named tensors, only epoch \(int\), lr \(dict\)"),
        ({f"k{i}": i for i in range(9)}, r"k4 \(int\) and 4 more"),
        ([torch.zeros(2)], "no named tensors, only a list"),
        (torch.zeros(2), "no named tensors, only a Tensor"),
        ({}, "only an empty mapping"),
    ],
)
def test_a_file_without_named_tensors_is_refused_with_what_it_holds(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=f"w.pt: holds .*{said}"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["none.pt", "folder.pt", "w.npz", "w.safetensors", "w.pt", "cut.pt"])
def test_files_that_are_no_weights_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    for junk in ("w.npz", "w.safetensors", "w.pt"):
        (tmp_path / junk).write_bytes(b"junk")
    torch.save(drawn(1), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{name}: (no such file|expected a file|not a )"):
        read_weights(tmp_path / name)


class Evil:
    """Unpickled by an ordinary reader, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["new", "legacy", "plain pickle"])
def test_a_malicious_pickle_is_refused_and_never_executed(form: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "w.pth", tmp_path / "executed"
    content = {"state_dict": drawn(1), "args": Evil(mark)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"args": Evil(mark)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "new")
    with pytest.raises(InputError, match="refused: besides tensors it holds posix.mkdir.*write the state dict alone"):
        read_weights(path)
    assert not mark.exists()
    if form == "new":  # the file does what it is meant to: the test could fail
        torch.load(path, weights_only=False)
        assert mark.exists()


def test_a_namespace_brings_no_code_of_the_files_with_it(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(x=Evil(tmp_path / "executed")), "model": drawn(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="posix.mkdir"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "executed").exists()


def test_missing_names_are_listed_with_the_nearest_ones_and_counted(tmp_path: Path) -> None:
    state = drawn(1)
    state["conv_1.weight"] = state.pop("conv1.weight")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"8 tensors do; 1 are missing: conv1.weight \(nearest: conv_1.weight\)"):
        load_weights(Net(), tmp_path / "w.pt")
    torch.save({"backbone.0.weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"0 tensors do; 8 are missing: .* and 3 more. The file has backbone.0.weight"):
        load_weights(Net(), tmp_path / "w.pt")


def test_wrong_shapes_are_listed_with_both_and_nothing_is_loaded(tmp_path: Path) -> None:
    state, net = drawn(1), Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state["conv1.weight"] = torch.zeros(5, 3, 7, 7)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"1 have another shape: conv1.weight \(5, 3, 7, 7\) for \(5, 3, 3, 3\)"):
        load_weights(net, tmp_path / "w.pt")
    assert same(net.state_dict(), before)


@pytest.mark.parametrize("classes", [4, 9, None])
def test_an_optional_classifier_may_be_there_or_of_another_size_or_missing(classes: int | None, tmp_path: Path) -> None:
    state, net = drawn(1, classes or 4), Net()
    own = net.fc.weight.detach().clone()
    if classes is None:
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    torch.save(prefixed(state, "module."), tmp_path / "w.pt")
    match = load_weights(net, tmp_path / "w.pt", optional=["fc."])
    assert net.conv1.weight.equal(state["conv1.weight"]) and net.bn1.running_mean.equal(state["bn1.running_mean"])  # type: ignore[operator]
    assert net.fc.weight.equal(state["fc.weight"] if classes == 4 else own)
    if classes == 4:
        assert str(match) == "9 of 9 tensors; prefix 'module.' stripped"
    elif classes:
        assert "7 of 9 tensors" in str(match) and "other shape fc.weight (9, 5) for (4, 5), fc.bias" in str(match)
    else:
        assert match.missing == ("fc.weight", "fc.bias") and "missing fc.weight, fc.bias" in match.describe()
    if classes != 4:
        with pytest.raises(InputError, match="fc.weight"):
            load_weights(net, tmp_path / "w.pt")


def test_counters_of_batch_norm_may_be_missing_and_what_is_not_used_is_told(tmp_path: Path) -> None:
    state = {name: value for name, value in drawn(1).items() if "num_batches" not in name}
    torch.save({**state, "head.0.weight": torch.zeros(3)}, tmp_path / "w.pt")
    match = load_weights(Net(), tmp_path / "w.pt")
    assert match.missing == () and match.unexpected == ("head.0.weight",)
    assert str(match) == "8 of 8 tensors; 1 of the file not used: head (1)"


def test_what_is_not_used_is_told_by_the_parts_of_the_file_that_it_is_in(tmp_path: Path) -> None:
    more = {
        **prefixed(drawn(2), "module.encoder_k."),
        "module.encoder_q.projector.0.weight": torch.zeros(3),
        "module.encoder_q.projector.2.weight": torch.zeros(3),
        "module.encoder_q.bn1.scale": torch.zeros(1),
        "module.queue": torch.zeros(9),
        "step": torch.tensor(3),
    }
    torch.save({**prefixed(drawn(1), "module.encoder_q."), **more}, tmp_path / "w.pt")
    match = load_weights(Net(), tmp_path / "w.pt")
    parts = ["module.encoder_k (9)", "module.encoder_q.projector (2)", "module.encoder_q.bn1.scale (1)"]
    assert match.unused() == [*parts, "module.queue (1)", "step (1)"]
    assert str(match).endswith("14 of the file not used: " + ", ".join(match.unused()))


def test_a_fit_is_found_without_loading_anything_also_where_nothing_is_allocated(tmp_path: Path) -> None:
    state, net = drawn(1), Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.device("meta"):
        empty = Net()
    for module in (net, empty):
        assert fit_weights(module, prefixed(state, "a."), (), "here").matched == tuple(state)
        with pytest.raises(InputError, match="here: does not fit the model: 7 tensors do; 2 are missing"):
            fit_weights(module, {n: v for n, v in state.items() if not n.startswith("fc.")}, (), "here")
    assert same(net.state_dict(), before)


class Staged(nn.Module):
    """Blocks in containers of each kind, and a classifier."""

    def __init__(self, layers: int = 2, blocks: int = 2) -> None:
        super().__init__()
        self.layer = nn.Sequential(*(Net() for _ in range(layers)))
        self.blocks = nn.ModuleList(Net() for _ in range(blocks))
        self.fc = nn.Sequential(nn.ReLU(), nn.Linear(5, 4))


@pytest.mark.parametrize("prefix", ["", "module.", "a.b."])
@pytest.mark.parametrize("larger, named", [({"layers": 3}, "layer.2.conv1.weight"), ({"blocks": 4}, "blocks.2.conv1")])
def test_the_file_of_a_larger_net_is_refused_and_nothing_is_loaded(
    larger: dict[str, int], named: str, prefix: str, tmp_path: Path
) -> None:
    net = Staged()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.save(prefixed(Staged(**larger).state_dict(), prefix), tmp_path / "w.pt")
    with pytest.raises(InputError, match=f"of a larger net, {9 * (sum(larger.values()) - 2)} of its tensors .*{named}"):
        load_weights(net, tmp_path / "w.pt", optional=["fc."])
    assert same(net.state_dict(), before)


def test_the_file_of_a_longer_sequential_is_refused_but_heads_beside_it_are_not(tmp_path: Path) -> None:
    net, longer = (nn.Sequential(*(nn.Linear(3, 3) for _ in range(size))) for size in (2, 3))
    torch.save(longer.state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="2.weight, 2.bias"):
        load_weights(net, tmp_path / "w.pt")
    torch.save({**net.state_dict(), **prefixed(longer.state_dict(), "projector.")}, tmp_path / "w.pt")
    assert len(load_weights(net, tmp_path / "w.pt").unexpected) == 6


def test_other_nets_heads_and_classifiers_may_be_left_over(tmp_path: Path) -> None:
    state = Staged().state_dict()
    more = {
        **prefixed(Staged(layers=9).state_dict(), "module.encoder_k."),
        **prefixed(drawn(2), "module.encoder_q.projector."),
        "module.encoder_q.fc.4.weight": torch.zeros(9),
        "module.encoder_q.layer.0.conv1.weight_average": torch.zeros(9),
        "module.queue": torch.zeros(9),
    }
    torch.save({**prefixed(state, "module.encoder_q."), **more}, tmp_path / "w.pt")
    net = Staged()
    match = load_weights(net, tmp_path / "w.pt", optional=["fc."])
    assert same(net.state_dict(), state) and match.unexpected == tuple(more)


def test_the_identity_of_weights_is_of_names_shapes_types_and_values_alone() -> None:
    state = drawn(1)
    reordered = {name: state[name].clone() for name in reversed(state) if "num_batches" not in name}
    assert weights_identity(state) == weights_identity(reordered) != weights_identity(drawn(2))
    changed = [
        {**state, "conv1.weight": state["conv1.weight"].reshape(5, 27)},
        {**state, "conv1.weight": state["conv1.weight"].bfloat16()},
        {("x" if name == "fc.bias" else name): value for name, value in state.items()},
        {**state, "fc.bias": state["fc.bias"] + torch.tensor([0, 0, 0, 1e-6])},
    ]
    assert len({weights_identity(tensors) for tensors in (state, *changed)}) == 5
    other_memory = {**state, "conv1.weight": state["conv1.weight"].contiguous(memory_format=torch.channels_last)}
    assert weights_identity(other_memory) == weights_identity(state)
