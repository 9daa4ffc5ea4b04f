"""Draw the README's figure from a finished demo: NC1 of both sources while they train.

.venv/bin/python tools/figure_demo.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "nc_dist"  # the same bytes for the same numbers
from matplotlib import pyplot  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CURVES = (("train_before", "train probe", "-"), ("heldout_before", "held-out probe", "--"))


def main() -> None:
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for variant, colour in (("ce", "tab:blue"), ("supcon", "tab:orange")):
        rows = map(json.loads, (ROOT / f"runs/demo/pretrain/{variant}/metrics.jsonl").read_text().splitlines())
        measured = [row for row in rows if "nc/train_before/nc1" in row]
        steps = [row["step"] for row in measured]
        for place, name, line in CURVES:
            values = [row[f"nc/{place}/nc1"] for row in measured]
            axes.plot(steps, values, line, marker=".", color=colour, label=f"{variant}, {name}")
    axes.set(xlabel="optimiser step", ylabel="NC1 of the kept features", yscale="log")
    axes.set_title("Fashion-MNIST, resnet8, d = 64, K = 10; 200 samples a class, held-out 100", fontsize=9)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    out = ROOT / "tools/figures/demo_nc1.svg"
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    print(out.relative_to(ROOT))


if __name__ == "__main__":
    main()
