"""What --dry-run says of a pre-training run and of a cluster, and what the shipped run files would take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from processes import ROOT, SMALL, rows

from nc_dist.config import PretrainRun
from nc_dist.data.catalog import entry, is_described, name_and_split
from nc_dist.data.order import check_world
from nc_dist.errors import BAD_INPUT, DONE
from nc_dist.launch.start import start
from nc_dist.model import Model, check_input
from nc_dist.plan import Cluster
from nc_dist.plan.gpus import gpu
from nc_dist.plan.model_cost import ModelSize, model_cost
from nc_dist.pretrain_plan import checkpoint_size, cluster_plan, disk_lines, measured_at, work_of
from nc_dist.source_set import logit_classes, open_source_set
from nc_dist.spec import load

RUN_FILES = sorted((ROOT / "configs/pretrain").glob("*.yaml"))
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def planned(*overrides: str, cluster: Cluster | None = None, dry_run: bool = True, journey: str = "pretrain") -> int:
    return start(journey, SMALL, list(overrides), "here", dry_run, None, False, cluster)


def size(text: str) -> float:
    """Of `1.5 GB`."""
    number, unit = re.match(r"([\d.]+) (\w*)B", text).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def test_the_plan_has_a_row_for_each_stage_and_marks_the_runs_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned(f"out={tmp_path / 'x'}", "engine.kind=deepspeed", "engine.zero=2") == DONE
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines() if "ZeRO" in line] == [["ZeRO", str(n)] for n in range(4)]
    assert "ZeRO 2 <- this run" in said and "GPU-hours" in said and "unknown without a GPU" in said
    assert "possible numbers of processes                 [1, 2, 4]" in said
    assert not (tmp_path / "x").exists()


def test_a_cluster_that_one_does_not_have_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(f"out={tmp_path / 'x'}", cluster=Cluster(2, 2, "h200")) == DONE
    said = capsys.readouterr().out
    assert re.search(r"processes +4\n", said) and re.search(r"accumulated per process +1\n", said)
    assert "141 GB (h200): the run fits" in said and "bytes that leave a node in a step" in said
    assert "are reached: assumed, not measured; slow data" in said


def test_a_cluster_that_does_not_divide_the_batch_is_refused_with_those_that_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned(f"out={tmp_path / 'x'}", cluster=Cluster(1, 3)) == BAD_INPUT
    assert "world size 3 does not divide the 4 micro-batches of a step; possible: [1, 2, 4]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cluster", "dry_run", "journey", "message"),
    [
        (Cluster(1, 2), False, "pretrain", "with --dry-run only"),
        (Cluster(1, 2), True, "finetune", "--nodes, --gpus-per-node and --gpu plan a pretrain"),
        (Cluster(2), True, "pretrain", "--nodes 2: say --gpus-per-node as well"),
        (Cluster(gpu="abacus"), True, "pretrain", "--gpu abacus: unknown; known are"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cluster: Cluster, dry_run: bool, journey: str, message: str
) -> None:
    out = tmp_path / "x"
    file = SMALL if journey == "pretrain" else ROOT / "configs/finetune/digits.yaml"
    assert start(journey, file, [f"out={out}"], "here", dry_run, None, False, cluster) == BAD_INPUT
    assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("overrides", "world", "again"),
    [
        ([], 1, 0),
        (["loss.kind=supcon"], 1, 1),  # four micro-batches of one process: outputs are found first, then again
        (["loss.kind=supcon"], 4, 0),
        (["engine.recompute=true"], 1, 1),
        (["adversary.kind=pgd", "adversary.steps=3"], 1, 6),
    ],
)
def test_what_a_run_computes_again_is_known(overrides: list[str], world: int, again: int) -> None:
    run = load(PretrainRun, SMALL, overrides)
    data = open_source_set(run)
    cost = model_cost(run.model, 0, run.input, 2)
    done = work_of(run, data, cost, world)
    images = data.steps * run.batch.global_ * run.loss.views
    assert done.training == 3 * cost.flops * images and done.repeated == again * cost.flops * images
    probed = 10 * run.probe.per_class + 10 * run.data.holdout_per_class  # type: ignore[operator]
    assert done.probes == cost.flops * probed * (1 + len(measured_at(run, data)[0]))


@pytest.mark.slow
def test_measures_and_disk_of_a_real_run_are_those_of_its_plan(finished_run: Path, small_shards: Path) -> None:
    run = load(PretrainRun, finished_run / "run.yaml")
    data = open_source_set(run)
    measured = {row["step"] for row in rows(finished_run) if "nc/train_before/nc1" in row}
    saves = {int(path.name.removeprefix("step_")) for path in (finished_run / "checkpoints").glob("step_*[0-9]")}
    assert measured == {0} | measured_at(run, data)[0]
    assert saves <= measured_at(run, data)[1]

    cost = model_cost(run.model, len(data.source.class_names), run.input, run.batch.micro)
    line = disk_lines(run, data, cost)["disk"]
    one = size(re.search(r"checkpoints of ([^ ]+ \w+)", line).group(1))  # type: ignore[union-attr]
    export = size(re.search(r"export ([^ ]+ \w+)", line).group(1))  # type: ignore[union-attr]
    curves = size(re.search(r"curves ([^ ]+ \w+)", line).group(1))  # type: ignore[union-attr]
    newest = max((finished_run / "checkpoints").glob("step_*[0-9]"), key=lambda path: int(path.name[5:]))
    # Names and headers weigh in with so small a net.
    assert one <= held(newest) <= 1.25 * one and export <= held(finished_run / "export") <= 1.25 * export
    assert 0.7 * curves <= held(finished_run / "tb") + held(finished_run / "metrics.jsonl") <= 1.3 * curves
    assert size(line) >= held(finished_run / "checkpoints")


def held(path: Path) -> int:
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


IMAGENET = ROOT / "configs/pretrain/imagenet_resnet50_ce.yaml"


def cluster_planned(*overrides: str, cluster: Cluster | None = None, file: Path = IMAGENET) -> int:
    small = ["model.backbone.name=resnet18", "input.size=32"]
    return start("pretrain", file, [*small, *overrides], "here", True, None, False, cluster)


def test_a_catalogued_set_is_planned_for_a_named_cluster_without_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NC_DIST_DATA", str(tmp_path))
    assert cluster_planned(cluster=Cluster(1, 8, "h200")) == DONE
    said = capsys.readouterr().out
    assert re.search(rf"training samples +{1281167 - 20000}\n", said) and re.search(r"held out +20000\n", said)
    assert re.search(r"data.train +1,281,167 samples of 1,000 classes from the catalogue, not read \(.*manifest", said)
    assert re.search(r"data.test +50,000 samples of 1,000 classes from the catalogue, not read", said)
    assert re.search(r"images read and decoded as a check +none\n", said) and "GPU-hours" in said
    probed, forward = 200 * 1000 + 50_000, size(re.search(r"parameters, (.*?)FLOP a forward", said)[1] + "B")  # type: ignore[index]
    final = size(re.search(r"NC probes, (.*?)FLOP source accuracy", said)[1] + "B")  # type: ignore[index]
    assert final == pytest.approx(probed * forward, rel=0.02)


@pytest.mark.parametrize(
    ("overrides", "cluster", "message"),
    [
        ([], None, "no readable manifest"),
        (["data.train=imagenet_wds:fit"], Cluster(1, 8), "no readable manifest"),  # nothing is published of it
        (["data.train=shards/mine"], Cluster(1, 8), "without the data a set of the catalogue can be planned"),
        (["data.test=TMP/birds.yaml:test"], Cluster(1, 8), "its classes are not those of"),
        (["data.test=imagenet_wds:train"], Cluster(1, 8), "the very samples of data.train"),
    ],
)
def test_without_data_all_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, overrides: list[str],
    cluster: Cluster | None, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("NC_DIST_DATA", str(tmp_path))
    about = "reader: {kind: folder, paths: {train: a, test: b}}\nclasses: 20\nsamples: {test: 90}\n"
    (tmp_path / "birds.yaml").write_text(about)
    here = [text.replace("TMP", str(tmp_path)) for text in overrides]
    assert cluster_planned(*here, cluster=cluster) == BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_net_that_cannot_be_traced_is_planned_as_far_as_it_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NC_DIST_ALLOW_USER_CODE", "1")
    own = "model.backbone={kind: own, function: test_model_cost:looks_at_values, image_size: 8}"
    assert planned(f"out={tmp_path / 'x'}", own, cluster=Cluster(1, 2, "h200")) == DONE
    said = capsys.readouterr().out
    assert re.search(r"FLOPs and activations +unknown, the net cannot be traced \(DataDependentOutput", said)
    assert re.search(r"model +200 parameters\n", said) and "whether the run fits is unknown" in said
    assert re.search(r"torch, DDP <- this run +800 B +800 B .* unknown +unknown", said)
    assert re.search(r"disk +[\d.]+ kB: ", said) and "GPU-hours" not in said and "0 FLOP" not in said


@pytest.mark.parametrize("settings", [["ema=0.9"], ["model.classifier.kind=etf"], ["engine.precision=fp64"]])
def test_a_checkpoint_has_one_size_in_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str]
) -> None:
    assert planned(f"out={tmp_path / 'x'}", *settings) == DONE
    said = capsys.readouterr().out
    checked = re.search(r"a checkpoint +(.*?), about", said)[1]  # type: ignore[index]
    kept = re.search(r"checkpoints of (.*?) at", said)[1]  # type: ignore[index]
    assert checked == kept
    run = load(PretrainRun, SMALL, settings)
    model = Model(run.model, 10)
    element = 8 if "engine.precision=fp64" in settings else 4
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = element * sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * (element if b.is_floating_point() else 8) for b in model.buffers())
    exact = 3 * (weights + buffers) * (2 if run.ema else 1) + element * trained  # itself, two files of export; momentum
    assert size(checked) == pytest.approx(exact, rel=5e-3)


def test_frozen_parameters_have_no_state_in_a_checkpoint() -> None:
    frozen, trained = ModelSize((100,), 1000, 8), ModelSize((100, 1000), 0, 8)
    run = load(PretrainRun, SMALL)
    assert checkpoint_size(run, trained) - checkpoint_size(run, frozen) == 4 * 1000  # momentum


def test_nc_is_measured_at_chosen_epochs_too() -> None:
    settings = ["keep_epochs=[0.5, 1]", "save_every=30", "measure_every=25"]
    run = load(PretrainRun, SMALL, settings)
    data = open_source_set(run)
    epoch = data.order.steps_per_epoch
    measures, saves = measured_at(run, data)
    assert saves == {round(0.5 * epoch), epoch, 30, data.steps} and measures == saves | {25, 50}


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_the_model_of_every_run_file_takes_its_input_and_fits_the_hardware_that_it_names(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NC_DIST_DATA", str(tmp_path))
    run = load(PretrainRun, path)
    name, _ = name_and_split(run.data.train)
    if not is_described(name) or "train" not in entry(name).samples:
        run = run.model_copy(update={"data": run.data.model_copy(update={"train": "fashion_mnist:train"})})
    data = open_source_set(run, published=True)
    header = path.read_text()[: path.read_text().index("\nout:")]
    assert len(path.read_text().splitlines()) <= 45
    assert "Hardware" in header and ("not yet run" in header or "Number" in header or "result" in header)
    classes = logit_classes(run, data.source.class_names)
    assert check_input(run.model, run.input, classes, run.batch.micro * run.loss.views) > 0

    named = re.search(r"--nodes (\d+) --gpus-per-node (\d+) --gpu (\w+)", header)
    nodes, gpus, name = (int(named[1]), int(named[2]), named[3]) if named else (1, run.launch.workers, "h200")
    assert nodes * gpus == run.launch.workers
    check_world(data.order.micro_per_step, nodes * gpus)
    plan = cluster_plan(run, data, Cluster(nodes, gpus, gpu(name).name), nodes * gpus)
    assert plan["memory of the GPU"].endswith("the run fits")
    print(path.stem, plan["GPU-hours"], plan["NC probe"], plan["disk"], sep="\n   ")
