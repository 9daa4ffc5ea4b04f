"""The ledger of finished runs and the four files of a report; `nc-dist report` calls `write_report`.

Reading is pure: a finished run is a `result.json`, an unfinished one only a `status.json`.
"""

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nc_dist.errors import InputError
from nc_dist.report.html import render_html, render_markdown
from nc_dist.report.tables import Row, build_sections

KEYS = ["trial", "variant", "dataset", "method", "seed", "shots", "metric", "accuracy"]
JSONL = [*KEYS, "nc1_source", "nc1_downstream", "trainable_percent", "seconds"]
NC1 = ["nc1_train_before", "nc1_train_after", "nc1_test_before", "nc1_test_after"]
COLUMNS = [*JSONL, *NC1, "trainable_parameters", "train_samples", "test_samples", "started", "ended"]
FILES = {"html": "report.html", "markdown": "report.md", "csv": "results.csv", "jsonl": "results.jsonl"}

ASIDE = re.compile(r"\.\d{8}-\d{6}(-\d+)?$")  # how run_folder.prepare names a folder that it moves aside

NAMES = {"pretrain": ("variant",), "finetune": ("variant", "dataset", "method")}
KEPT = {"pretrain": "nc1_source", "finetune": "nc1_train_before"}  # the NC1 that is nc.train_before.nc1
FRACTIONS = {"pretrain": ("source_accuracy", "source_ncc_accuracy"), "finetune": ("accuracy",)}
NUMBERS = {
    "pretrain": ("nc1_source", "epochs", "seconds", "world_size"),
    "finetune": ["shots", *COLUMNS[len(KEYS) :]],
}


class Problem(NamedTuple):
    """Something without a usable result: "broken", "not shown", or the state of an unfinished run."""

    kind: str
    where: str
    reason: str


@dataclass(frozen=True)
class Ledger:
    """All runs below a folder: `sources` (pretrain), `trials` (finetune), and what could not be used."""

    sources: list[Row]
    trials: list[Row]
    problems: list[Problem]


def collect(folder: Path) -> Ledger:
    """Read every result.json and status.json below `folder`; InputError (a ValueError) if there is none."""
    paths = sorted([*folder.rglob("result.json"), *folder.rglob("status.json")])
    if not paths:
        raise InputError(f"no result.json below {folder}: give the folder that holds the finished runs")
    runs: dict[str, list[Row]] = {"pretrain": [], "finetune": []}
    problems: list[Problem] = []
    for path in paths:
        where = str(path.relative_to(folder))
        if (left_out := _left_out(path, folder)) is not None:
            problems += [Problem("not shown", where, left_out)] * (path.name == "result.json")
            continue
        try:
            row = _read(path)
            if path.name == "status.json":
                problems += _unfinished(row, path.parent, folder)
            elif row.get("journey") in NAMES:
                runs[row["journey"]].append(_checked(row, path.parent.name))
            elif row.get("journey") != "sweep":  # which only lists its trials
                problems.append(Problem("not shown", where, f"no table for journey {row.get('journey')!r}"))
        except (OSError, ValueError) as error:
            problems.append(Problem("broken", where, str(error)))
    runs["pretrain"].sort(key=lambda row: (row["variant"], str(row.get("seed"))))
    runs["finetune"].sort(key=_trial_order)
    return Ledger(runs["pretrain"], runs["finetune"], problems)


def _left_out(path: Path, folder: Path) -> str | None:
    """Why a run is no part of the report: --fresh moved it aside, or its sweep has other trials by now."""
    if any(ASIDE.search(part) for part in path.relative_to(folder).parts[:-1]):
        return "moved aside by --fresh"
    trial = path.parent
    sweep = trial.parent.parent / "sweep.json"
    if trial.parent.name == "trials" and sweep.is_file() and trial.name not in json.loads(sweep.read_text())["trials"]:
        return "no trial of its sweep any more: source or data have changed"
    return None


def write_report(folder: Path, out: Path) -> dict[str, str | int]:
    """Write report.html, report.md, results.csv and results.jsonl into `out`; returns paths and row counts.

    Where any run was on a CPU the heading says "toy scale", else it names the devices. InputError when `folder` holds
    no run.
    """
    ledger = collect(folder)
    devices = {str(row.get("device", "cpu")) for row in (*ledger.sources, *ledger.trials)}
    scale = "toy scale" if "cpu" in devices else ", ".join(sorted(devices))
    sections = build_sections(ledger.sources, ledger.trials, ledger.problems)
    facts = _facts(ledger)
    extra = {key for row in ledger.trials for key, value in row.items() if not isinstance(value, list | dict)}
    paths = {kind: out / name for kind, name in FILES.items()}
    out.mkdir(parents=True, exist_ok=True)
    paths["html"].write_text(render_html(scale, facts, sections), "utf-8")
    paths["markdown"].write_text(render_markdown(scale, facts, sections), "utf-8")
    with paths["csv"].open("w", encoding="utf-8", newline="") as file:
        header = [*COLUMNS, *sorted(extra - {*COLUMNS, "journey"})]
        table = csv.DictWriter(file, header, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(ledger.trials)
    lines = [json.dumps({key: row.get(key) for key in JSONL}) for row in ledger.trials]
    paths["jsonl"].write_text("".join(f"{line}\n" for line in lines), "utf-8")
    counts = {"sources": len(ledger.sources), "trials": len(ledger.trials), "problems": len(ledger.problems)}
    return {kind: str(path) for kind, path in paths.items()} | counts


def _facts(ledger: Ledger) -> dict[str, int]:
    """The counts in the heading."""
    return {
        "source variants": len({row["variant"] for row in (*ledger.sources, *ledger.trials)}),
        "data sets": len({row["dataset"] for row in ledger.trials}),
        "methods": len({row["method"] for row in ledger.trials}),
        "trials": len(ledger.trials),
        "runs left out": len(ledger.problems),
    }


def _unfinished(status: Row, run: Path, folder: Path) -> list[Problem]:
    """What a status.json says of a run that failed, or that has no result for another reason."""
    state = str(status.get("state"))
    reports_on_itself = state == "running" and run == folder  # a sweep, at its end
    finished = state == "done" or (state != "failed" and (run / "result.json").exists())
    if finished or reports_on_itself:
        return []
    return [Problem(state, str(run.relative_to(folder)), str(status.get("reason") or "no reason recorded"))]


def _read(path: Path) -> Row:
    """One JSON object; NaN and infinities become None, so that they count as missing everywhere."""
    row = json.loads(path.read_text("utf-8"), parse_float=_finite, parse_constant=_finite)
    if not isinstance(row, dict):
        raise ValueError(f"holds a {type(row).__name__}, not an object")
    return row


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _checked(row: Row, folder: str) -> Row:
    """The row with `nc` and `trial` filled in; ValueError names the first key that cannot be used."""
    journey = row["journey"]
    for key in NAMES[journey]:
        if not isinstance(row.get(key), str):
            raise ValueError(f"{key}: {row.get(key)!r} is not a name")
    for key in (*NUMBERS[journey], *FRACTIONS[journey]):
        value = row.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{key}: {value!r} is not a number")
        if value is not None and key in FRACTIONS[journey] and not 0 <= value <= 1:
            raise ValueError(f"{key}: {value!r} is not a fraction in 0..1")
    if journey == "finetune" and row.get("accuracy") is None:
        raise ValueError("accuracy: missing")
    nc = row.get("nc") or {}
    if not isinstance(nc, dict) or not all(isinstance(site, dict | None) for site in nc.values()):
        raise ValueError("nc: not an object of objects")
    kept: dict[str, Any] = {"nc1": row.get(KEPT[journey]), **(nc.get("train_before") or {})}
    return {**row, "nc": {**nc, "train_before": kept}, "trial": row.get("trial") or folder}


def _trial_order(row: Row) -> tuple[Any, ...]:
    shots = math.inf if row.get("shots") is None else row["shots"]
    return row["dataset"], shots, row["variant"], row["method"], str(row.get("seed"))
