"""The torch engine in fp64: one process, two and four give the same journey, whatever is switched on (architecture.md
6b). And what follows from a loss that is NaN, over ranks: the step is skipped by all of them, counted and listed.

All journeys of a world size share one group of processes.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SMALL, cli, curve, read_json, relative, rows, run_ranks, said
from safetensors.torch import load_file

from nc_dist.config import PretrainRun
from nc_dist.data.augment import normalise
from nc_dist.errors import Diverged, Preempted
from nc_dist.model import Model
from nc_dist.pretrain import pretrain
from nc_dist.run_folder import prepare, result_of
from nc_dist.source_set import open_source_set
from nc_dist.spec import load

pytestmark = pytest.mark.slow

STEPS, SIZES = 8, (1, 2, 4)
VIT = {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2, "drop_path_rate": 0.5}
HEAD = ["model.head.kind=mlp", "engine.clip=0.2"]
CASES = {
    "clipping and averages": ["ema=0.9"],
    "drop-path": [f"model.backbone={{kind: timm, name: vit_tiny_patch16_224, args: {json.dumps(VIT)}}}"],
    "mixup": ["data.mix={kind: mixup, alpha: 1.0}"],
    "supcon": ["loss.kind=supcon", *HEAD],
    "pgd": ["adversary={kind: pgd, epsilon: 1.0}", "ema=0.9"],
    "pgd and supcon": ["adversary={kind: pgd, norm: linf, epsilon: 0.1, steps: 2}", "loss.kind=supcon", *HEAD],
    "recomputed": ["engine.recompute=true", "engine.channels_last=false"],
}
NAN = ["data.augment={kind: none}", "ema=0.9", "max_skipped=1"]  # one sample of step 3 makes the net give NaN
COMMON = ["engine.precision=fp64", f"epochs={STEPS / 43}", "measure_every=4", "save_every=1000", "optim.lr=0.1"]


def run_of(out: Path, settings: list[str]) -> PretrainRun:
    return load(PretrainRun, SMALL, [f"out={out}", *COMMON, *settings])


def journey(world: Any, out: Path, settings: list[str], stop_after: int | None = None) -> None:
    """A whole journey, result included; with `stop_after` it is asked to stop at that step and taken up again."""
    run = run_of(out, settings)
    if world.rank == 0:
        prepare(run)
    world.barrier()
    if stop_after:
        asked = iter(range(1, STEPS))
        with pytest.raises(Preempted):
            pretrain(run, world, lambda: next(asked) == stop_after)
    result = pretrain(run, world, lambda: False)
    if world.rank == 0:
        (out / "result.json").write_text(json.dumps(result))
    world.barrier()


def nan_for(white: torch.Tensor, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
    """In training, a model gives NaN for the image `white`."""
    if not (isinstance(module, Model) and module.training):
        return None
    same = (args[0] == white).flatten(1).all(1)
    return (torch.where(same[:, None, None, None], torch.nan, args[0]),)


def nan_sample(out: Path) -> tuple[str, torch.Tensor]:
    """Key and normalised image of a sample of step 3, of the second half of the global batch."""
    run = run_of(out, NAN)
    data = open_source_set(run)
    position = int(data.train[data.order.rank_step(0, 2, 0, 1)].ravel()[-1])
    return data.source.key(position), normalise(data.source.read(position)[None], run.input, torch.float64)


def every_journey(world: Any, out: Path) -> str:
    """What the diverging one said."""
    for name, settings in CASES.items():
        journey(world, out / name, settings)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(partial(nan_for, nan_sample(out)[1]))
    journey(world, out / "nan", NAN)
    journey(world, out / "nan resumed", NAN, stop_after=5)
    hook.remove()
    with pytest.raises(Diverged) as diverged:
        journey(world, out / "diverged", ["optim.lr=1e200", "schedule.warmup=0", "max_skipped=2", "measure_every=100"])
    return str(diverged.value)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[str]]]:
    """The folder of each world size's journeys, and what its ranks returned."""
    outs = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in SIZES}
    return {size: (out, run_ranks(every_journey, size, out, timeout=300)) for size, out in outs.items()}


def weights(out: Path, export: str = "export") -> dict[str, torch.Tensor]:
    return load_file(out / export / "model.safetensors")


def assert_same(ours: Path, theirs: Path, steps: int = STEPS) -> None:
    """Losses, norms, NC and final weights, averaged ones too, to 1e-9."""
    assert rows(ours)[-1].keys() == rows(theirs)[-1].keys()
    names = [name for name in rows(theirs)[-1] if name.endswith(("_before/nc1", "acc1"))]
    for key in ("train/loss", "train/grad_norm", *names):
        a, b = curve(ours, key), curve(theirs, key)
        assert a.keys() == b.keys() and len(a) >= (steps if key.startswith("train/") else 2), key
        worst = max(relative(a[step], b[step]) for step in a)
        assert worst < 1e-9, f"{key}: {worst:.1e}"
    for export in sorted(path.name for path in theirs.glob("export*")):
        mine, expected = weights(ours, export), weights(theirs, export)
        assert mine.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-11, msg=f"{export}: {name}")


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("case", CASES)
def test_a_journey_does_not_know_the_world_size(found: Any, case: str, size: int) -> None:
    assert_same(found[size][0] / case, found[1][0] / case)


def test_each_case_is_another_journey(found: Any) -> None:
    """Or the cases would show nothing. Recomputed blocks are the exception, they change no number."""
    last = {case: curve(found[1][0] / case)[STEPS] for case in CASES}
    plain = last.pop("clipping and averages")
    assert relative(last.pop("recomputed"), plain) < 1e-9
    assert len({f"{value:.6f}" for value in [plain, *last.values()]}) == len(last) + 1
    assert min(curve(found[1][0] / "clipping and averages", "train/grad_norm").values()) > 1.2, "clipped"


def test_attacked_training_has_the_larger_loss(found: Any) -> None:
    assert curve(found[1][0] / "pgd")[1] > curve(found[1][0] / "clipping and averages")[1] * 1.01


@pytest.mark.parametrize("size", SIZES)
def test_averaged_weights_are_measured_exported_and_in_the_result(found: Any, size: int) -> None:
    out = found[size][0] / "clipping and averages"
    result, last = read_json(out / "result.json"), rows(out)[-1]
    assert result["ema"]["nc1_source"] == last["nc/ema_train_before/nc1"] != last["nc/train_before/nc1"]
    assert result["ema"]["heldout_accuracy"] == last["val/ema_acc1"]
    assert result["nc1_source"] == last["nc/train_before/nc1"] and result["heldout_accuracy"] == last["val/acc1"]
    raw, averaged = weights(out), weights(out, "export_ema")
    assert raw.keys() == averaged.keys()
    same = {name for name in raw if raw[name].equal(averaged[name])}
    assert same == {name for name in raw if name.endswith("num_batches_tracked")}
    config = read_json(out / "export_ema" / "config.json")
    assert config["nc1_source"] == result["ema"]["nc1_source"]
    saved = out / "checkpoints" / f"step_{STEPS}"
    assert all(value.equal(weights(saved, "export_ema")[name]) for name, value in averaged.items())
    assert "ema" not in read_json(found[size][0] / "mixup" / "result.json")
    assert not (found[size][0] / "mixup" / "export_ema").exists()


@pytest.mark.parametrize("size", SIZES)
def test_a_step_with_a_nan_sample_is_skipped_by_all_and_training_goes_on(found: Any, size: int) -> None:
    out = found[size][0] / "nan"
    (line,) = [json.loads(line) for line in (out / "skipped_steps.jsonl").read_text().splitlines()]
    assert (line["step"], line["loss"], len(line["keys"])) == (3, "nan", 32)
    assert line["keys"][-1] == nan_sample(out)[0]
    assert list(curve(out, "train/skipped").values()) == [0, 0, 1, 1, 1, 1, 1, 1]
    assert list(curve(out)) == [1, 2, 4, 5, 6, 7, 8] and read_json(out / "result.json")["skipped_steps"] == 1
    assert_same(out, found[1][0] / "nan", steps=STEPS - 1)
    assert (found[1][0] / "nan" / "skipped_steps.jsonl").read_text() == (out / "skipped_steps.jsonl").read_text()


@pytest.mark.parametrize("size", SIZES)
def test_averages_and_skipped_steps_survive_a_resume_bit_for_bit(found: Any, size: int) -> None:
    whole, resumed = (found[size][0] / name for name in ("nan", "nan resumed"))
    for key in ("train/loss", "train/grad_norm", "train/skipped", "val/ema_acc1", "nc/ema_train_before/nc1"):
        assert curve(whole, key) == curve(resumed, key), key
    for export in ("export", "export_ema"):
        expected = weights(whole, export)
        assert [name for name, value in weights(resumed, export).items() if not value.equal(expected[name])] == []
    assert (whole / "skipped_steps.jsonl").read_text() == (resumed / "skipped_steps.jsonl").read_text()
    assert read_json(resumed / "result.json")["skipped_steps"] == 1


@pytest.mark.parametrize("size", SIZES)
def test_a_run_with_more_skipped_steps_than_allowed_stops_on_all_ranks(found: Any, size: int) -> None:
    out, messages = found[size][0] / "diverged", found[size][1]
    lines = [json.loads(line) for line in (out / "skipped_steps.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and result_of(out) is None
    last = lines[-1]["step"]
    assert [line["step"] for line in lines] == [last - 2, last - 1, last]
    assert len(messages) == size and len(set(messages)) == 1
    assert f"step {last}: the loss is nan. 3 steps were skipped, max_skipped=2" in messages[0]
    assert str(out / "skipped_steps.jsonl") in messages[0]


def test_the_command_trains_in_half_precision_against_an_adversary_with_averages(tmp_path: Path) -> None:
    out = tmp_path / "robust"
    keys = ["adversary.kind=pgd", "adversary.epsilon=0.5", "engine.precision=bf16", "ema=0.9", "epochs=0.2"]
    done = cli("pretrain", SMALL, f"out={out}", *keys, "--on", "here")
    assert done.returncode == 0, said(done)
    assert len(curve(out)) == 9 and 0 < read_json(out / "result.json")["ema"]["heldout_accuracy"] <= 1
    assert curve(out, "train/skipped")[9] == 0


def test_the_command_ends_with_1_where_training_diverges(tmp_path: Path) -> None:
    """Whether the limit or a measure with weights that are infinite comes first."""
    for name, settings in (("limit", ["max_skipped=3"]), ("measure", ["max_skipped=100"])):
        out = tmp_path / name
        done = cli("pretrain", SMALL, f"out={out}", "optim.lr=1e30", "schedule.warmup=0", *settings, "--on", "here")
        assert done.returncode == 1, said(done)
        status = read_json(out / "status.json")
        assert status["state"] == "failed" and status["reason"].startswith("Diverged: "), status
        assert str(out / "skipped_steps.jsonl") in status["reason"]
        lines = [json.loads(line) for line in (out / "skipped_steps.jsonl").read_text().splitlines()]
        assert len(lines) >= 4 and all(line["loss"] == "nan" and len(line["keys"]) == 32 for line in lines)
        assert ("max_skipped=3" if name == "limit" else "features are not finite") in status["reason"]
