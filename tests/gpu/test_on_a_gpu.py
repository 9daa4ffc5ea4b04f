"""What only a GPU can show: bf16, and the plain path on a device. Skipped where there is none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from processes import SMALL, curve, read_json, run_command, said

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize(("kind", "precision"), [("torch", "fp32"), ("torch", "bf16"), ("deepspeed", "fp32")])
def test_a_pretrain_on_the_gpu_learns_and_measures(tmp_path: Path, kind: str, precision: str) -> None:
    settings = [f"out={tmp_path / 'run'}", f"engine.kind={kind}"]
    settings += [f"engine.precision={precision}"] if kind == "torch" else []
    command = [sys.executable, "-m", "nc_dist", "pretrain", str(SMALL), *settings, "--on", "here"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    done = run_command(command, timeout=180, CUDA_VISIBLE_DEVICES=visible)
    assert done.returncode == 0, said(done)
    result, losses = read_json(tmp_path / "run/result.json"), list(curve(tmp_path / "run").values())
    assert result["device"] != "cpu" and result["nc1_source"] > 0
    assert sum(losses[-10:]) < sum(losses[:10])


def test_bf16_outputs_are_near_fp32_ones() -> None:
    from nc_dist.backbones import SmallResNetSpec
    from nc_dist.engine import TorchSpec
    from nc_dist.engine.torch_engine import TorchEngine
    from nc_dist.model import Model, ModelSpec
    from nc_dist.optim import SGD
    from nc_dist.world import World

    torch.manual_seed(0)
    model = Model(ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=16)), 10)
    world, images = World(device=torch.device("cuda")), torch.randn(16, 3, 32, 32, device="cuda")
    outputs = {}
    for precision in ("fp32", "bf16"):
        engine = TorchEngine(model, TorchSpec(precision=precision), SGD(), world)
        outputs[precision] = engine.eval_forward(images).logits_BK
    assert outputs["bf16"].dtype == torch.bfloat16 and outputs["fp32"].dtype == torch.float32
    torch.testing.assert_close(outputs["bf16"].float(), outputs["fp32"], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [torch.bfloat16, torch.float32])
def test_moments_on_the_gpu_are_those_of_the_cpu_also_inside_autocast(
    dtype: torch.dtype, features: torch.dtype
) -> None:
    from nc_dist.nc import HalvedMoments, SecondPass, summary

    random = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (2000,), generator=random)
    feats = (20 * torch.randn(10, 256, generator=random)[labels] + torch.randn(2000, 256, generator=random)).to(
        features
    )
    found = {}
    for device in ("cpu", "cuda"):
        moments = HalvedMoments(10, 256, dtype=dtype, device=device)
        with torch.autocast("cuda", torch.bfloat16):
            for x, y in zip(feats.split(300), labels.split(300), strict=True):
                moments.update(x.to(device), y.to(device))
            second = SecondPass(moments)
            second.update(feats.to(device), labels.to(device))
            found[device] = {**summary(moments), **second.metrics(lambda tensor: tensor)}
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    for name, value in found["cpu"].items():
        if isinstance(value, float):
            assert found["cuda"][name] == pytest.approx(value, rel=tolerance), name


def test_batches_reach_the_device_as_they_were_read() -> None:
    """By loader workers, pinned on the way."""
    import numpy as np

    from nc_dist.data.augment import InputSpec
    from nc_dist.data.catalog import open_source
    from nc_dist.data.stream import eval_batches
    from nc_dist.world import World

    source, positions = open_source("digits:train"), np.arange(300)
    worlds = World(), World(device=torch.device("cuda"))
    here, there = (list(eval_batches(source, positions, InputSpec(size=8), 64, world, workers=1)) for world in worlds)
    for a, b in zip(here, there, strict=True):
        assert b.images.is_cuda and b.images.dtype == torch.uint8 and b.images.cpu().equal(a.images)
        assert b.labels.cpu().equal(a.labels)
