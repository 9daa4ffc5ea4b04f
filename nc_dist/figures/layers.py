"""The layer-wise figure of a measurement: raw NC1, `nc1_pca` and the null over the places of a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CURVES: dict[str, tuple[str, dict[str, Any]]] = {  # metric: label, style
    "nc1": ("NC1", {"marker": "o", "color": "#1f5fa8"}),
    "nc1_null": ("null: permuted labels", {"marker": ".", "color": "#8a8a8a", "linestyle": "--"}),
    "nc1_pca": ("nc1_pca: comparable over places", {"marker": "s", "color": "#c4581a"}),
}


def layer_figure(places: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Write an SVG; places in network order. A place without `nc1_pca` (d < 2K) is marked as not comparable."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    names = list(places)
    figure = Figure(figsize=(max(6.0, 1.6 + 0.42 * len(names)), 4.2), layout="constrained")
    axes = figure.subplots()
    for key, (label, style) in CURVES.items():
        points = [(i, places[name].get(key)) for i, name in enumerate(names)]
        shown = [(i, value) for i, value in points if value is not None and value > 0]
        if shown:
            axes.plot(*zip(*shown, strict=True), label=label, markersize=5, linewidth=1.4, **style)
    for i, name in enumerate(names):
        if places[name].get("nc1_pca") is None:
            axes.annotate("n.c.", (i, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=7)
    labels = [f"{name}\nd={places[name]['d']}" for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=60, ha="right", fontsize=7)
    axes.set_yscale("log")
    axes.grid(alpha=0.25)
    first = places[names[0]]
    axes.set_title(f"{title}\nK = {first['K']}, N = {first['N']}, n = {first['n_min']} a class", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "nc_dist"}):
        figure.savefig(path, metadata={"Date": None})
