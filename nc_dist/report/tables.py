"""Rows of the ledger -> the sections of a report: pure; `report.write_report` calls `build_sections`.

Collapse on the source and collapse downstream stand in separate sections, tables and figures.
Seeds are averaged first; data sets, shots and metrics are never pooled.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from nc_dist.report.html import DASH, Point, Section, Table, bars, is_number, percent, same, scatter, short, spread

Row = dict[str, Any]
Cells = dict[tuple[str, str, str], dict[str, float]]  # (target, variant, method) -> seed -> value

PROBE = "linear_probe"
DOWNSTREAM = "Downstream side: collapse on the target"
MIN_VARIANTS = 5
ACCURACIES = ("source_accuracy", "source_ncc_accuracy")
SITES = {
    "train_before": "train, before head",
    "train_after": "train, after head",
    "heldout_before": "held-out, before head",
    "heldout_after": "held-out, after head",
}
METRICS = (
    "nc1",
    "nc1_null",
    "nc1_floor",
    "nc1_split_half",
    "nc1_trace",
    "nc1_pca",
    "nc2_equinorm",
    "nc2_equiangular",
    "nc2_etf",
    "nc3_zhu",
    "nc4",
)
SHAPE = ("d", "K", "N")
COUNTS = (*SHAPE, "rank", "n_min", "n_max")


def build_sections(
    sources: Sequence[Row], trials: Sequence[Row], problems: Sequence[tuple[str, str, str]]
) -> list[Section]:
    """The parts of the report in reading order; a part without data is left out."""
    variants: defaultdict[str, list[Row]] = defaultdict(list)
    for row in sources:
        variants[row["variant"]].append(row)
    parts = []
    if variants:
        parts.append(_source_training(variants))
    if trials:
        parts += [_transfer(trials), _source_side(trials, variants), _downstream_side(trials)]
    if problems:
        text = "What lies below the folder without a usable result."
        table = Table("Runs and reasons", ("What", "Where", "Why"), problems)
        parts.append(Section("Runs left out", [text], [table]))
    return parts


def correlation(points: Sequence[Point], shapes: Mapping[str, str]) -> str:
    """Pearson r of log10 NC1 and log-odds accuracy over variants, one point each; or why there is none.

    `shapes` says for each variant what its NC1 was measured on ("d 64"): raw NC1 depends on it, so variants
    of different shape are not correlated. The interval is a bootstrap over variants.
    """
    n = len(points)
    count = f"n = {n} variant{'' if n == 1 else 's'}"
    if n < MIN_VARIANTS:
        return f"{count}: no correlation is computed"
    kinds = sorted({shapes.get(point.variant, "unknown shape") for point in points})
    if len(kinds) > 1:
        return f"{count} of different shape ({'; '.join(kinds)}): no correlation is computed"
    share = np.clip([point.accuracy for point in points], 1e-3, 1 - 1e-3)
    x, y = np.log10([point.nc1 for point in points]), np.log(share / (1 - share))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return f"{count}, all with the same value: no correlation is computed"
    draws = np.random.default_rng(0).integers(n, size=(2000, n))
    low, high = np.nanpercentile(_pearson(x[draws], y[draws]), [2.5, 97.5])
    needed = math.tanh(1.96 / math.sqrt(n - 3))  # Fisher's z: 0.57 for 12 variants
    r = float(_pearson(x, y))
    return f"{count}: r = {r:+.2f} (95 % interval {low:+.2f} to {high:+.2f}; 5 % level: |r| > {needed:.2f})"


def _pearson(x: Any, y: Any) -> Any:
    """Pearson r along the last axis; NaN for a constant draw."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


def _target(row: Row) -> str:
    """The column of a trial: data set, shots and metric together, so that only like is averaged."""
    shots, metric = row.get("shots"), row.get("metric") or "top1"
    few = "" if shots is None else f", {shots} shots"
    return f"{row['dataset']}{few}" + ("" if metric == "top1" else f", {str(metric).replace('_', ' ')}")


def _methods(trials: Iterable[Row]) -> list[str]:
    """Methods by the mean share of parameters they train, smallest first, unknown last."""
    shares: defaultdict[str, list[float]] = defaultdict(list)
    for row in trials:
        share = row.get("trainable_percent")
        shares[row["method"]].append(math.inf if share is None else share)
    return sorted(shares, key=lambda method: (fmean(shares[method]), method))


def _cells(trials: Iterable[Row], key: str) -> Cells:
    """Values of `key` by (target, variant, method) and seed; trials that repeat a seed are averaged."""
    runs: defaultdict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for row in trials:
        runs[_target(row), row["variant"], row["method"], str(row.get("seed"))].append(row[key])
    cells: Cells = defaultdict(dict)
    for (target, variant, method, seed), values in runs.items():
        cells[target, variant, method][seed] = fmean(values)
    return dict(cells)


def _points(trials: Iterable[Row], key: str) -> dict[str, list[Point]]:
    """By target, one point a variant and method: seeds averaged, NC1 (`key`) as its logarithm."""
    usable = [{**row, "log": math.log10(row[key])} for row in trials if (row.get(key) or 0) > 0]
    logs, accuracies = _cells(usable, "log"), _cells(usable, "accuracy")
    points: defaultdict[str, list[Point]] = defaultdict(list)
    for (target, variant, method), seeds in logs.items():
        accuracy = fmean(accuracies[target, variant, method].values())
        points[target].append(Point(variant, method, 10 ** fmean(seeds.values()), accuracy))
    return points


def _measured(runs: Sequence[Row], site: str, key: str) -> list[Any]:
    return [(run["nc"].get(site) or {}).get(key) for run in runs]


def _shape(runs: Sequence[Row], site: str) -> str:
    """What the raw NC1 depends on: width, classes, samples."""
    return " · ".join(f"{key} {same(_measured(runs, site, key))}" for key in SHAPE)


def _beside(runs: Sequence[Row], site: str) -> str:
    """What stands beside an NC1: its shape, its value under permuted labels, how far halves of the samples differ."""
    null, gap = (
        [value for value in _measured(runs, site, key) if is_number(value)] for key in ("nc1_null", "nc1_split_half")
    )
    halves = f"±{100 * fmean(gap):.0f} %" if gap else DASH
    return f"{_shape(runs, site)} · null {short(fmean(null)) if null else DASH} · halves {halves}"


def _source_training(variants: Mapping[str, Sequence[Row]]) -> Section:
    rows, details = [], []
    for variant, runs in variants.items():
        made = [same(run.get(key) for run in runs) for key in ("loss", "head", "backbone", "epochs")]
        judged = [spread([run.get(key) for run in runs], percent) for key in ACCURACIES]
        how = [same(run.get(key) for run in runs) for key in ("engine", "world_size")]
        nc1 = []
        for site, name in SITES.items():
            metrics = [spread(_measured(runs, site, key)) for key in METRICS]
            details.append((variant, name, *metrics, *(same(_measured(runs, site, key)) for key in COUNTS)))
            nc1.append(f"{metrics[0]}\n{_beside(runs, site)}")
        rows.append((variant, *made, *judged, *nc1, *how, spread(run.get("seconds") for run in runs)))
    header = ["Variant", "Loss", "Head", "Backbone", "Epochs", "Linear probe, %", "Class centre, %"]
    header += [f"NC1, {name}" for name in SITES.values()] + ["Engine", "Workers", "Seconds"]
    text = (
        "Every variant, with or without a classifier of its own, is judged on the source test set by the "
        "same linear probe and by the nearest class centre. The features before the head are the ones kept."
    )
    tables = [
        Table("Sources", header, rows),
        Table("Collapse on the source in detail", ["Variant", "Measured on", *METRICS, *COUNTS], details),
    ]
    return Section("Source training", [text], tables)


def _transfer(trials: Sequence[Row]) -> Section:
    cells, methods = _cells(trials, "accuracy"), _methods(trials)
    targets = list(dict.fromkeys(map(_target, trials)))
    text = [
        "Test accuracy in per cent, top-1 unless the column says otherwise; ± is the sample standard "
        "deviation over n seeds, a cell without it is one seed, and a dash was not run. Trainable is the "
        "share of parameters that were tuned, which varies with the number of classes. Bars are means over "
        "variants, dots the variants.",
    ]
    if repeats := len(trials) - sum(map(len, cells.values())):
        text.append(f"Trials that repeat a cell and its seed: {repeats}; averaged before anything else.")
    rows = []
    for variant, method in sorted({cell[1:] for cell in cells}, key=lambda c: (c[0], methods.index(c[1]))):
        found = [spread(cells.get((target, variant, method), {}).values(), percent) for target in targets]
        rows.append((variant, method, _trainable(trials, variant, method), *found))
    tables = [Table("Transfer accuracy", ["Variant", "Method", "Trainable, %", *targets], rows)]
    if len(methods) > 1:
        text.append(
            "The paired table compares two methods on the variants and seeds that both were run on: "
            "difference in percentage points, ± over n variants."
        )
        pairs = [
            (f"{more} − {less}", *(_difference(cells, target, less, more) for target in targets))
            for less, more in combinations(methods, 2)
        ]
        tables.append(Table("Paired differences of methods", ["Methods", *targets], pairs))
    return Section("Transfer", text, tables, [bars(t, _means(cells, t, methods)) for t in targets])


def _trainable(trials: Sequence[Row], variant: str, method: str) -> str:
    """Smallest and largest share of tuned parameters, in per cent."""
    own = [row for row in trials if (row["variant"], row["method"]) == (variant, method)]
    shares = [row["trainable_percent"] for row in own if row.get("trainable_percent") is not None]
    if not shares:
        return DASH
    return " to ".join(dict.fromkeys(f"{share:.2f}" for share in (min(shares), max(shares))))


def _means(cells: Cells, target: str, methods: Sequence[str]) -> dict[str, list[float]]:
    """Accuracies of the variants by method, seeds averaged."""
    means: dict[str, list[float]] = {method: [] for method in methods}
    for (where, _, method), seeds in cells.items():
        if where == target:
            means[method].append(fmean(seeds.values()))
    return means


def _difference(cells: Cells, target: str, less: str, more: str) -> str:
    """Mean over variants of the accuracy difference, seeds paired and averaged first."""
    gains = []
    for variant in sorted({variant for where, variant, _ in cells if where == target}):
        first, second = cells.get((target, variant, less), {}), cells.get((target, variant, more), {})
        if shared := sorted(first.keys() & second.keys()):
            gains.append(fmean(second[seed] - first[seed] for seed in shared))
    if not gains:
        return DASH
    ahead = f"ahead in {sum(gain > 0 for gain in gains)} of {len(gains)}"
    return f"{spread(gains, lambda gain: f'{100 * gain:+.1f}')}\n{ahead}"


def _source_side(trials: Sequence[Row], variants: Mapping[str, Sequence[Row]]) -> Section:
    shapes = {variant: _shape(runs, "train_before") for variant, runs in variants.items()}
    methods, panels = _methods(trials), []
    for target, points in _points(trials, "nc1_source").items():
        groups = {method: [point for point in points if point.method == method] for method in methods}
        notes: defaultdict[str, list[str]] = defaultdict(list)
        for method, group in groups.items():
            if group:
                notes[correlation(group, shapes)].append(method)
        note = [f"{', '.join(who)}: {what}" for what, who in notes.items()] if len(notes) > 1 else list(notes)
        panels.append(scatter(target, "NC1, source train", groups, note))
    text = [
        "Horizontal, logarithmic: NC1 of the kept features on the source training probe. Vertical: test "
        "accuracy after transfer. One point is one variant, seeds averaged. No line is drawn, since the "
        "relation need not be monotone, and no verdict is given.",
        "Version 3 of arXiv 2212.12206 names loss design, data augmentation and projection heads as "
        "heuristics for pre-training. Version 4 (TMLR 2024) also studies the relation shown here, but does "
        "not make it its main claim: a rising or falling line would not be its result.",
    ]
    if not panels:
        text.append("No trial recorded nc1_source: there is nothing to show.")
    return Section("Source side: collapse on the source", text, [], panels)


def _downstream_side(trials: Sequence[Row]) -> Section:
    probes = [row for row in trials if row["method"] == PROBE]
    by_target = _points(probes, "nc1_train_before")
    names = list(dict.fromkeys(row["variant"] for row in probes))
    rows: dict[str, list[str]] = {name: [] for name in names}
    panels = []
    for target, points in by_target.items():
        own = {name: [p for p in probes if (_target(p), p["variant"]) == (target, name)] for name in names}
        shapes = {name: _shape(own[name], "train_before") for name in names}
        groups = {name: [point for point in points if point.variant == name] for name in names}
        panels.append(scatter(target, "NC1, downstream train, frozen", groups, [correlation(points, shapes)]))
        for name, group in groups.items():
            beside = _beside(own[name], "train_before")
            cell = (f"{short(p.nc1)}, probe {percent(p.accuracy)} %\n{beside}" for p in group)
            rows[name].append(next(cell, DASH))
    text = [
        "Horizontal, logarithmic: NC1 of the frozen features on the downstream training set, before any "
        "tuning. Vertical: test accuracy of the linear probe on the same features. Each data set stands "
        "alone, since NC1 over different numbers of classes cannot be compared. No verdict is given.",
        "For linear probing, version 4 of arXiv 2212.12206 (TMLR 2024) reports that more collapse of "
        "pre-trained features on the downstream training data goes with higher transfer accuracy. Collapse "
        "of training features after full fine-tuning is interpolation and is not used as evidence here.",
    ]
    if not panels:
        return Section(DOWNSTREAM, [*text, f"No {PROBE} trial recorded nc1_train_before: nothing to show."])
    caption = "Frozen-feature NC1 on downstream train, and linear-probe accuracy"
    table = Table(caption, ["Variant", *by_target], [(name, *cells) for name, cells in rows.items()])
    return Section(DOWNSTREAM, text, [table], panels)
