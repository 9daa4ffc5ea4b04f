"""The measuring journey by its command: any model, checkpoints by a glob, a reference, and what it leaves behind."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import ROOT, SMALL, read_json
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.models import resnet18

from nc_dist import moments_file
from nc_dist.data import shards
from nc_dist.data.augment import InputSpec, normalise
from nc_dist.data.catalog import open_source
from nc_dist.data.stream import eval_batches
from nc_dist.errors import BAD_INPUT
from nc_dist.launch.start import start
from nc_dist.model import load_exported
from nc_dist.nc import watch
from nc_dist.nc.metrics import summary
from nc_dist.world import World

CONFIG = ROOT / "configs/measure/digits.yaml"
SMALL_INPUT = ["input.size=32"]


def measured(out: Path, *overrides: str) -> Path:
    assert start("measure", CONFIG, [f"out={out}", *overrides], "here", False, None, False) == 0
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that kept all of its checkpoints."""
    out = tmp_path_factory.mktemp("measured") / "source"
    kept = [f"out={out}", "keep=null", "epochs=0.8", "save_every=10"]
    assert start("pretrain", SMALL, kept, "here", False, None, False) == 0
    return out


def nc1_two_pass(feats: torch.Tensor, labels: torch.Tensor) -> float:
    """(1/K) tr(Sigma_W Sigma_B^+), by its definition."""
    x = feats.double()
    means = torch.stack([x[labels == k].mean(0) for k in labels.unique()])
    within = torch.cat([x[labels == k] - means[i] for i, k in enumerate(labels.unique())])
    between = (means - x.mean(0)) / len(means) ** 0.5
    solved = torch.linalg.pinv(between) @ torch.linalg.pinv(between).T
    return float((within @ solved * within).sum() / len(x) / len(means))


def test_every_checkpoint_of_a_glob_is_measured_in_the_order_of_steps(source: Path, tmp_path: Path) -> None:
    out = measured(tmp_path / "nc", f"model={source}/checkpoints/step_*", "rank_per_class=5")
    result = read_json(out / "result.json")
    steps = [row["step"] for row in result["measured"]]
    assert steps == sorted(steps) and len(steps) >= 3
    events = EventAccumulator(str(out / "tb")).Reload()
    for place in ("layer1.0", "before"):
        assert [event.step for event in events.Scalars(f"nc/{place}/nc1")] == steps
    for step in steps:
        folder = out / f"step_{step}"
        nc = read_json(folder / "nc.json")
        assert (folder / "layers.svg").read_text().startswith("<?xml")
        assert nc["before"]["nc1"] > 0 and nc["before"]["numerical_rank_centred"] > 1 and nc["before"]["rank_n"] == 5
    with (out / "nc.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows if row["place"] == "before"] == [f"step_{step}" for step in steps]


def test_the_last_checkpoint_of_a_glob_is_the_exported_model(source: Path, tmp_path: Path) -> None:
    steps = read_json(source / "result.json")["steps"]
    of_checkpoint = measured(tmp_path / "a", f"model={source}/checkpoints/step_{steps}")
    of_run = measured(tmp_path / "b", f"model={source}")
    assert read_json(of_checkpoint / "nc.json") == read_json(of_run / "nc.json")


def test_the_moments_file_gives_every_metric_again_and_what_pass_two_adds_is_beside_them(
    source: Path, tmp_path: Path
) -> None:
    out = measured(tmp_path / "nc", f"model={source}")
    nc, file = read_json(out / "nc.json"), moments_file.load(out / "moments.safetensors")
    assert list(file.places) == ["layer1.0", "layer2.0", "layer3.0", "after"]
    for place, moments in file.places.items():
        again = summary(moments, *file.classifiers.get(place, (None, None)))
        for name, value in again.items():
            if isinstance(value, float) and nc[place][name] is not None:
                assert value == pytest.approx(nc[place][name], rel=1e-9), f"{place} {name}"
            else:
                assert not isinstance(value, float) or "nc show" in nc[place]["reasons"][name], name
    after = nc["after"]
    assert after["nc4"] > 0 and after["nc3_zhu"] > 0 and len(after["nc1_per_class"]) == 10
    counts = np.bincount(open_source("digits:train").labels)
    assert np.average(after["nc1_per_class"], weights=counts) == pytest.approx(after["nc1"], rel=1e-9)
    assert nc["layer1.0"]["reasons"]["nc3_zhu"] == "no classifier"


def test_nc_watch_in_a_plain_loop_equals_measure(source: Path, tmp_path: Path) -> None:
    nc = read_json(measured(tmp_path / "nc", f"model={source}") / "nc.json")
    exported, digits = load_exported(source), open_source("digits:train")
    layers = {"backbone.net.layer2.0": "layer2.0", "input:classifier": "after"}
    with torch.no_grad(), watch(exported.model.eval(), list(layers), 10) as w:
        for batch in eval_batches(digits, np.arange(len(digits.labels)), exported.input, 100, World()):
            exported.model(normalise(batch.images, exported.input))
            w.update(batch.labels)
    for layer, values in w.metrics().items():
        place = nc[layers[layer]]
        for name, value in values.items():
            if isinstance(value, float) and place[name] is not None and name != "nc1_split_half":
                assert value == pytest.approx(place[name], rel=1e-5), f"{layer} {name}"
    assert w.metrics()["input:classifier"]["nc4"] == nc["after"]["nc4"] > 0


def test_a_second_forward_in_place_of_the_cache_changes_nothing(source: Path, tmp_path: Path) -> None:
    cached = measured(tmp_path / "a", f"model={source}", "per_class=20")
    forward = measured(tmp_path / "b", f"model={source}", "per_class=20", "cache_gb=0")
    assert read_json(cached / "result.json")["cached_bytes"] == 200 * (8 + 16 + 32 + 32) * 4
    assert read_json(forward / "result.json")["cached_bytes"] == 0
    assert read_json(cached / "nc.json") == read_json(forward / "nc.json")


def test_held_out_samples_are_measured_about_the_training_means(source: Path, tmp_path: Path) -> None:
    train = measured(tmp_path / "train", f"model={source}")
    test = measured(tmp_path / "test", f"model={source}", "data=digits:test", f"reference={train}/moments.safetensors")
    own, about = (read_json(folder / "nc.json")["before"] for folder in (train, test))
    assert about["nc1_test_about_train"] > about["nc1"] > 0 and 0.5 < about["ncc_acc1_about_train"] <= 1
    again = measured(tmp_path / "again", f"model={source}", f"reference={train}/moments.safetensors")
    same = read_json(again / "nc.json")["before"]
    assert same["nc1_test_about_train"] == pytest.approx(own["nc1"], rel=1e-9)
    assert same["ncc_acc1_about_train"] == own["ncc_acc1"]


def test_a_state_dict_with_a_prefix_goes_into_a_torchvision_net(tmp_path: Path) -> None:
    torch.manual_seed(5)
    net = resnet18(num_classes=7)
    state: dict[str, Any] = {f"module.encoder.{name}": value for name, value in net.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "moco.pth")
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, tmp_path / "net.safetensors")
    how = ["model=torchvision:resnet18", *SMALL_INPUT, "rank_per_class=0"]
    out = measured(tmp_path / "a", f"weights={tmp_path}/moco.pth", *how)
    other = measured(tmp_path / "b", f"weights={tmp_path}/net.safetensors", *how)
    nc, result = read_json(out / "nc.json"), read_json(out / "result.json")
    assert nc == read_json(other / "nc.json")
    assert "module.encoder." in str(result["measured"][0]), "the match is reported"
    assert len(nc) == 8 + 2
    assert nc["after"]["reasons"]["nc3_zhu"] == "the classifier is of 7 classes, the data has 10"
    assert nc["layer4.1"]["reasons"]["nc3_zhu"] == "no classifier"


def test_nc1_of_every_block_is_that_of_hooks_and_a_two_pass(tmp_path: Path) -> None:
    torch.manual_seed(5)
    net = resnet18()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    images = tmp_path / "images"
    list(shards.build(open_source("digits:train"), images, samples_per_shard=500, seed=0))
    out = measured(
        tmp_path / "nc", "model=torchvision:resnet18", f"weights={tmp_path}/net.pth", *SMALL_INPUT, f"data={images}"
    )
    nc = read_json(out / "nc.json")
    feats, labels = all_features(net, images)
    for name, values in feats.items():
        assert nc[name]["nc1"] == pytest.approx(nc1_two_pass(values, labels), rel=1e-5), name
    assert nc["before"]["nc1"] == nc["after"]["nc1"] == pytest.approx(nc["layer4.1"]["nc1"], rel=1e-4)


def all_features(net: torch.nn.Module, images: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    seen: dict[str, list[torch.Tensor]] = {"layer2.1": [], "layer4.1": []}
    for name in seen:
        net.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen[name].append(out.mean((2, 3))))
    source, labels = open_source(str(images)), []
    spec = InputSpec(size=32, crop=0.875, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    with torch.no_grad():
        for batch in eval_batches(source, np.arange(len(source.labels)), spec, 256, World()):
            net.eval()(normalise(batch.images, spec))
            labels.append(batch.labels)
    return {name: torch.cat(parts) for name, parts in seen.items()}, torch.cat(labels)


def test_features_that_are_not_finite_name_model_place_and_first_sample(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(source / "export", tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["layer2.0.bn1.bias"][0] = torch.nan
    save_file(state, broken / "model.safetensors")
    out = tmp_path / "nc"
    assert start("measure", CONFIG, [f"out={out}", f"model={broken}"], "here", False, None, False) == BAD_INPUT
    error = capsys.readouterr().err
    assert f"model={broken}: layer2.0: features are not finite" in error and "the sample is digits:train" in error
    assert not (out / "nc.json").exists() and not (out / "result.json").exists()


def test_a_reference_of_other_classes_or_no_moments_file_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for reference, why in ((source / "run.yaml", "moments"), (tmp_path / "none.safetensors", "none.safetensors")):
        overrides = [f"out={tmp_path / 'nc'}", f"model={source}", f"reference={reference}"]
        assert start("measure", CONFIG, overrides, "here", False, None, False) == BAD_INPUT
        error = capsys.readouterr().err
        assert f"reference='{reference}'" in error and why in error


def test_a_reference_of_another_model_or_input_is_refused_before_anything_starts(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = measured(tmp_path / "train", f"model={source}", "per_class=10")
    first = next(iter(sorted((source / "checkpoints").glob("step_*"))))
    for other, key in (([f"model={first}"], "its model is"), ([f"model={source}", "input.size=16"], "its input is")):
        overrides = [f"out={tmp_path / 'nc'}", *other, f"reference={train}/moments.safetensors"]
        assert start("measure", CONFIG, overrides, "here", False, None, False) == BAD_INPUT
        assert key in capsys.readouterr().err and not (tmp_path / "nc").exists()


def test_models_of_several_runs_keep_apart(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(source / "export", tmp_path / f"runs/{name}/export")
    out = measured(tmp_path / "nc", f"model={tmp_path}/runs/*/export", "per_class=10")
    with (out / "nc.csv").open() as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"a/export", "b/export"}
    assert read_json(out / "a/export/nc.json") == read_json(out / "b/export/nc.json")
    tags = EventAccumulator(str(out / "tb")).Reload().Tags()["scalars"]
    assert {"nc/a_export_before/nc1", "nc/b_export_before/nc1"} <= set(tags)


def test_bf16_has_the_floor_of_bf16_wherever_the_net_ends_in_fp32(source: Path, tmp_path: Path) -> None:
    nc = read_json(measured(tmp_path / "nc", f"model={source}", "per_class=10", "precision=bf16") / "nc.json")
    exact = read_json(measured(tmp_path / "fp32", f"model={source}", "per_class=10") / "nc.json")
    for place in ("layer1.0", "after"):
        assert nc[place]["nc1_floor"] > 1e6 * exact[place]["nc1_floor"]


def test_a_finished_measurement_of_weights_that_have_changed_is_not_passed_off_as_new(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(source / "export", tmp_path / "runs/x/export")
    overrides = [f"out={tmp_path / 'nc'}", f"model={tmp_path}/runs/*/export", "per_class=10"]
    assert start("measure", CONFIG, overrides, "here", False, None, False) == 0
    assert "nc1_null" in capsys.readouterr().out, "a table, no bare number"
    assert start("measure", CONFIG, overrides, "here", False, None, False) == 0
    assert "finished already" in capsys.readouterr().out
    state = load_file(copy / "model.safetensors")
    state["layer2.0.bn1.bias"] += 1
    save_file(state, copy / "model.safetensors")
    assert start("measure", CONFIG, overrides, "here", False, None, False) == BAD_INPUT
    assert "has other weights now; --fresh runs it anew" in capsys.readouterr().err
    shutil.copytree(copy, tmp_path / "runs/y/export")
    assert start("measure", CONFIG, overrides, "here", False, None, False) == BAD_INPUT
    assert "now names 2 models, then 1" in capsys.readouterr().err
