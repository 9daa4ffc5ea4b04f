"""Draw the README's figure of what NC1 says over widths: raw, null and nc1_pca of one fixed signal and of pure noise.

.venv/bin/python tools/figure_nc.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "nc_dist"  # the same bytes for the same numbers
from matplotlib import pyplot  # noqa: E402

from nc_dist.nc import ClassMoments, Statistics  # noqa: E402
from nc_dist.nc.metrics import nc1, nc1_null, nc1_pca, nc1_trace  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CLASSES, PER_CLASS, WIDTHS = 10, 200, (64, 128, 256, 512, 1024, 2048)
CURVES = {
    "NC1": (nc1, "o-", "tab:blue"),
    "null: permuted labels": (nc1_null, ".--", "tab:gray"),
    "nc1_pca": (nc1_pca, "s-", "tab:orange"),
    "trace ratio": (nc1_trace, "^-", "tab:green"),
}


def statistics(dim: int, norm: float) -> Statistics:
    """Ten orthogonal class means of this norm in unit noise."""
    labels = torch.arange(CLASSES).repeat(PER_CLASS)
    noise = torch.randn(len(labels), dim, generator=torch.Generator().manual_seed(0))
    moments = ClassMoments(CLASSES, dim)
    moments.update(norm * torch.eye(CLASSES, dim)[labels] + noise, labels)
    return moments.statistics()


def main() -> None:
    figure, both = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axes, (title, norm) in zip(
        both, (("one signal (class means of norm 5)", 5.0), ("pure noise", 0.0)), strict=True
    ):
        found = [statistics(dim, norm) for dim in WIDTHS]
        for label, (metric, line, colour) in CURVES.items():
            values = [metric(stats) for stats in found]
            axes.plot(WIDTHS, values, line, color=colour, markersize=4, label=label)
            print(f"{title}, {label}: " + "  ".join(f"{value:.3g}" for value in values))
        axes.set(xscale="log", yscale="log", xlabel="width d", xticks=WIDTHS, xticklabels=WIDTHS)
        axes.minorticks_off()
        axes.set_title(f"{title}; K = {CLASSES}, n = {PER_CLASS}", fontsize=9)
    both[0].legend(fontsize=8, frameon=False)
    out = ROOT / "tools/figures/nc_widths.svg"
    figure.savefig(out, metadata={"Date": None})
    print(out.relative_to(ROOT))


if __name__ == "__main__":
    main()
