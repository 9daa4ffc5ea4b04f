"""Whole runs of backbones from elsewhere: published files to start from, timm's nets, a net of the user's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SMALL, cli, curve, read_json, said

from nc_dist.backbones import SmallResNetSpec

pytestmark = pytest.mark.slow

QUICK = ["epochs=0.12", "save_every=2", "measure_every=4", "batch.global=16"]
ALLOW = "--allow-user-code"


def train(out: Path, *args: object, code: int = 0, journey: str = "pretrain", **env: str) -> str:
    done = cli(journey, SMALL, f"out={out}", *QUICK, *args, "--on", "here", env=env)
    assert done.returncode == code, said(done)
    return done.stdout + done.stderr


def test_a_run_starts_from_a_file_says_so_and_goes_on_without_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, file, out = SmallResNetSpec(name="resnet8", width=8).build().net, tmp_path / "w.pth", tmp_path / "run"
    net.fc = torch.nn.Linear(32, 1000)
    torch.save({"model": torch.nn.DataParallel(net).state_dict()}, file)
    weights = f"model.backbone.weights={file}"
    told = f"{file}: 54 of 54 tensors; prefix 'module.' stripped; 2 of the file not used: module.fc (2); "
    assert told in train(out, weights, "--dry-run") and not out.exists()
    assert "weights: " + told in train(out, weights)
    result = read_json(out / "result.json")
    assert told in result["weights"]["report"] and result["weights"]["from"] == str(file)
    losses = curve(out)
    train(tmp_path / "scratch")
    assert curve(tmp_path / "scratch")[1] != losses[1]

    file.unlink()
    (out / "result.json").unlink()  # as if it had been stopped before its end
    assert "those of the checkpoint" in train(out, weights, "--dry-run")
    assert "54 of 54" not in train(out, weights)
    assert read_json(out / "result.json")["weights"] == result["weights"] and curve(out) == losses
    assert "weights=" in train(tmp_path / "other", weights, code=2) and not (tmp_path / "other").exists()


def test_a_timm_net_with_drop_path_trains_and_is_measured(tmp_path: Path) -> None:
    net = ["model.backbone.kind=timm", "model.backbone.name=test_vit", "data.augment.kind=none", "input.size=32"]
    args = "model.backbone.args={img_size: 32, patch_size: 8, depth: 3, drop_path_rate: 0.2}"
    train(tmp_path / "run", *net, args)
    assert read_json(tmp_path / "run/result.json")["steps"] == len(curve(tmp_path / "run"))
    out = tmp_path / "nc"
    done = cli("measure", write(tmp_path / "m.yaml", out=out, model=tmp_path / "run", data="digits:test", per_class=3))
    assert done.returncode == 0, said(done)
    assert {"blocks.0", "blocks.2"} <= read_json(out / "nc.json").keys() or "blocks.2" in str(
        read_json(out / "nc.json")
    )
    assert "timm has no such model" in train(tmp_path / "x", *net[:1], "model.backbone.name=vit9", code=2)


def write(path: Path, **keys: Any) -> Path:
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return path


CODE = """
from torch import nn

def net(dim):
    return nn.Sequential(nn.Conv2d(3, dim, 3), nn.BatchNorm2d(dim), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_a_net_of_the_users_trains_and_is_opened_only_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "their_nets.py").write_text(CODE)
    found = {"PYTHONPATH": str(tmp_path)}
    own = ["model.backbone.kind=own", "model.backbone.function=their_nets:net", "model.backbone.args={dim: 7}"]
    assert ALLOW in train(tmp_path / "run", *own, code=2, **found) and not (tmp_path / "run").exists()
    train(tmp_path / "run", *own, ALLOW, **found)
    result = read_json(tmp_path / "run/result.json")
    assert result["backbone"] == "their_nets:net"

    measure = write(tmp_path / "m.yaml", out=tmp_path / "nc", model=tmp_path / "run", data="digits:test", per_class=3)
    tune = tmp_path / "f.yaml"
    tune.write_text(
        f"out: {tmp_path}/ft\nsource: {tmp_path}/run\ndata: {{train: digits, shots: 5}}\nmethod: {{kind: full}}\n"
        "batch: {global: 16, micro: 16}\nepochs: 1\n"
    )
    for journey, file in (("measure", measure), ("finetune", tune)):
        refused, done = cli(journey, file, env=found), cli(journey, file, ALLOW, env=found)
        assert refused.returncode == 2 and ALLOW in refused.stderr, said(refused)
        assert done.returncode == 0, said(done)


def test_the_permission_reaches_the_workers_of_a_ray_cluster(tmp_path: Path) -> None:
    (tmp_path / "their_nets.py").write_text(CODE)
    own = ["model.backbone.kind=own", "model.backbone.function=their_nets:net", "model.backbone.args={dim: 7}"]
    done = cli(
        *("pretrain", SMALL, f"out={tmp_path}/run", *QUICK, *own, "launch.workers=2", ALLOW, "--on", "ray"),
        timeout=180,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, said(done)
    (tmp_path / "sweep.yaml").write_text(
        f"out: {tmp_path}/sweep\nbase:\n  source: {tmp_path}/run\n  data: {{train: digits, shots: 5}}\n"
        "  method: {kind: linear_probe}\n  batch: {global: 16, micro: 16}\ngrid: {seed: [0]}\n"
    )
    done = cli("sweep", tmp_path / "sweep.yaml", ALLOW, "--on", "ray", timeout=180, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, said(done)
