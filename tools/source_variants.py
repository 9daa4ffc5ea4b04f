#!/usr/bin/env python3
"""Trains six source models, three losses with and without a head, and keeps their NC over epochs as a small JSON.

    .venv/bin/python tools/source_variants.py          # 12,000 Fashion-MNIST images, resnet8 width 8; half an hour
    .venv/bin/python tools/source_variants.py --table  # the committed numbers as a table

`--tune` tries three learning rates of each loss for TUNED epochs, without a head, and prints the accuracy on held-out
images, by which RATES were chosen. Toy scale, one seed: what it shows says nothing of ImageNet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tools/figures/source_variants.json"
COMMAND = "python tools/source_variants.py"
DATA = {"train": ("shards/fashion/train", 1200), "test": ("shards/fashion/test", 200)}
EPOCHS, TUNED, BATCH, HELD_OUT = 8, 3, 128, 100
LOSSES = {
    "ce": ["loss.kind=ce"],
    "mse": ["loss.kind=mse"],
    "supcon": ["loss.kind=supcon"],
}
RATES = {"ce": 0.3, "mse": 0.1, "supcon": 0.1}
TRIED = (0.3, 0.1, 0.03)
HEADS = {"none": ["model.head.kind=none"], "mlp": ["model.head.kind=mlp", "model.head.depth=2"]}
PLACES = ("train_before", "train_after", "heldout_before", "heldout_after")
KEPT = ("nc1", "nc1_trace", "nc2_equiangular", "cdnv")
RESULTS = ("nc1_source", "heldout_accuracy", "source_accuracy", "source_ncc_accuracy")


def nc_dist(*args: object) -> None:
    subprocess.run([sys.executable, "-m", "nc_dist", *map(str, args)], cwd=ROOT, check=True)


def build_shards() -> None:
    for split, (folder, per_class) in DATA.items():
        if not (ROOT / folder / "manifest.json").exists():
            nc_dist("shards", "build", f"fashion_mnist:{split}", folder, "--per-class", per_class)


def train(out: str, loss: str, head: str, lr: float, epochs: float) -> Path:
    """One variant; a finished one is not repeated."""
    every = (DATA["train"][1] - HELD_OUT) * 10 // BATCH  # an epoch
    settings = {
        "out": out, "data.train": DATA["train"][0], "data.test": DATA["test"][0], "data.holdout_per_class": HELD_OUT,
        "model.backbone.width": 8, "engine.kind": "torch", "engine.clip": 5.0, "optim.lr": lr, "epochs": epochs,
        "measure_every": every, "save_every": 5 * every, "probe.per_class": 200, "launch.workers": 1,
    }  # fmt: skip
    given = [f"{key}={value}" for key, value in settings.items()]
    nc_dist("pretrain", "configs/pretrain/demo_ce.yaml", *LOSSES[loss], *HEADS[head], *given, "--on", "here")
    return ROOT / out


def curves(out: Path) -> dict[str, Any]:
    """Epochs, and what was measured in them at the places that the variant has."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "nc/train_before/nc1" in row]
    keys = [f"nc/{place}/{name}" for place in PLACES for name in KEPT]
    found: dict[str, list[float | None]] = {"epoch": [], "val/acc1": []}
    found |= {key: [] for key in keys if any(key in row for row in measured)}
    per_epoch = (DATA["train"][1] - HELD_OUT) * 10 // BATCH
    for row in measured:
        for key in found:
            value = row["step"] / per_epoch if key == "epoch" else row.get(key)
            found[key].append(None if value is None else float(f"{value:.4g}"))
    return found


def tune() -> None:
    """The held-out accuracy of each loss and learning rate."""
    for loss in LOSSES:
        for lr in TRIED:
            out = train(f"runs/source_variants/tune/{loss}-{lr}", loss, "none", lr, TUNED)
            result = json.loads((out / "result.json").read_text())
            print(f"{loss:<8} lr {lr:<5} held-out {result['heldout_accuracy']} ncc {result['source_ncc_accuracy']}")


def show(tree: dict[str, Any]) -> None:
    """One row for each variant, at its last epoch."""
    print("| loss | head | NC1 train before / after | held-out before / after | linear probe, test | nearest centre |")
    print("|---|---|---|---|---|---|")
    for name, variant in tree["variants"].items():
        last = {key: values[-1] for key, values in variant["curves"].items()}
        pairs = [
            " / ".join(f"{value:.3g}" for place in ("before", "after") if (value := last.get(f"nc/{p}_{place}/nc1")))
            for p in ("train", "heldout")
        ]
        scores = [f"{100 * variant[key]:.1f} %" for key in ("source_accuracy", "source_ncc_accuracy")]
        print("| " + " | ".join([*name.split("-"), *pairs, *scores]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    if args.table:
        return show(json.loads(FILE.read_text()))
    build_shards()
    if args.tune:
        return tune()
    variants: dict[str, Any] = {}
    for loss in LOSSES:
        for head in HEADS:
            out = train(f"runs/source_variants/{loss}-{head}", loss, head, RATES[loss], EPOCHS)
            result = json.loads((out / "result.json").read_text())
            variants[f"{loss}-{head}"] = {"lr": RATES[loss], **{k: result[k] for k in RESULTS}, "curves": curves(out)}
    about = "12,000 Fashion-MNIST images, 1,000 of them held out, resnet8 width 8, one seed, toy scale"
    FILE.write_text(json.dumps({"command": COMMAND, "about": about, "variants": variants}, indent=1) + "\n")
    show(json.loads(FILE.read_text()))


if __name__ == "__main__":
    main()
