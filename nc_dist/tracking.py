"""What a run tells while it goes on: metrics.jsonl and TensorBoard, written by rank 0 alone.

The console shows what metrics.jsonl says (console.py), so the same lines appear however the run was started.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nc_dist.figures.gram import gram_figure
from nc_dist.world import World

FILE = "metrics.jsonl"
# One key set for every run, or TensorBoard takes its columns from the first one it meets.
HPARAMS = (
    "journey",
    "variant",
    "dataset",
    "method",
    "loss",
    "head",
    "classifier",
    "backbone",
    "lr",
    "weight_decay",
    "epochs",
    "seed",
)
OUTCOMES = ("accuracy", "nc1_source", "nc1_downstream", "trainable_percent")


class Tracker:
    """Writes scalars of steps; on other ranks than 0 every call does nothing.

    `start` is the step that the run goes on from, 0 for a beginning: what an earlier attempt wrote after it (from a
    beginning on: all) is cut off, in both files.
    """

    def __init__(self, out: Path, world: World, start: int = 0) -> None:
        self._file = self._board = None
        if world.rank != 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        cut_back(out / FILE, start if start else -1)
        self._file = (out / FILE).open("a")
        self._board = SummaryWriter(str(out / "tb"), purge_step=start + 1 if start else 0)

    def scalars(self, step: int, values: Mapping[str, float | None], **about: Any) -> None:
        """Finite values go to both files under one step; `about` goes to metrics.jsonl only."""
        if self._file is None or self._board is None:
            return
        finite = {key: float(v) for key, v in values.items() if v is not None and math.isfinite(v)}
        self._file.write(json.dumps({"step": step, **finite, **about}) + "\n")
        self._file.flush()
        for key, value in finite.items():
            self._board.add_scalar(key, value, step)

    def custom_page(self) -> None:
        """A page of TensorBoard's custom scalars on which the NC curves stand side by side."""
        if self._board is None:
            return
        places = ("train_before", "train_after", "heldout_before", "heldout_after")
        charts = {
            title: ["Multiline", [f"nc/{place}/{name}" for place in places]]
            for title, name in (
                ("NC1", "nc1"),
                ("NC1 trace ratio", "nc1_trace"),
                ("NC2 equiangularity", "nc2_equiangular"),
                ("NC3 self-duality", "nc3_zhu"),
                ("NC4 agreement", "nc4"),
            )
        }
        self._board.add_custom_scalars({"Neural collapse": charts})

    def hparams(self, about: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
        """The run's settings and results in TensorBoard's HPARAMS tab."""
        if self._board is None:
            return
        settings = {key: str(about.get(key, "")) for key in HPARAMS}
        results = {
            f"hparam/{key}": float(outcome[key]) if outcome.get(key) is not None else math.nan for key in OUTCOMES
        }
        self._board.add_hparams(settings, results, run_name=".")

    def class_means(self, step: int, centred_PD: Tensor, names: Sequence[str], projector: bool) -> None:
        """Class means minus the global mean: the figure nc/gram, and in the projector points with their names."""
        if self._board is None:
            return
        self._board.add_figure("nc/gram", gram_figure(centred_PD), step)
        if not projector:
            return
        plain = [" ".join(name.split()) or "-" for name in names]  # a table of one line a class, without a heading
        self._board.add_embedding(centred_PD.float(), metadata=plain, global_step=step, tag="class_means")

    def close(self) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def cut_back(path: Path, start: int) -> None:
    """Drop the rows of steps after `start`, and a last row that was cut short."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a row: the process was killed while it wrote
        if row["step"] <= start:
            rows.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(rows))
    partial.replace(path)


def flat_nc(probe: str, nc: Mapping[str, Any]) -> dict[str, float | None]:
    """`nc/<probe>_<place>/<metric>` for every number of a measured probe, `val/acc1..` for the held-out accuracies."""
    flat: dict[str, float | None] = {}
    prefix = f"{probe}_" if probe else ""
    for place, values in nc.items():
        if isinstance(values, dict):
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            flat |= {f"nc/{prefix}{place}/{name}": value for name, value in numbers.items()}
        elif place.startswith("acc1"):
            flat[f"val/{place}" if probe == "heldout" else f"nc/{prefix}{place}"] = values
    return flat


def flat_probes(nc: Mapping[str, Any]) -> dict[str, float | None]:
    """All numbers of several probes, {probe: what was measured}, under their TensorBoard names."""
    return {key: value for probe, places in nc.items() for key, value in flat_nc(probe, places).items()}


def nc_warnings(nc: Mapping[str, Any]) -> dict[str, list[str]]:
    """What speaks against the numbers of several probes, {"warnings": ["<probe>: ...", ..]}, or nothing.

    One line for each probe and kind of warning: the first place it is about, and how many more.
    """
    lines = []
    for probe, places in nc.items():
        kinds: dict[str, list[tuple[str, str]]] = {}
        for place, values in places.items():
            for what in values.get("warnings", []) if isinstance(values, dict) else []:
                kinds.setdefault(what.split()[0], []).append((place, what))
        for (place, what), *more in kinds.values():
            lines.append(f"{probe}: {what}, at {place}" + (f" and {len(more)} more places" if more else ""))
    return {"warnings": lines} if lines else {}
