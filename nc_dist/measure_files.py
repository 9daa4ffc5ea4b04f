"""What a measurement leaves behind: nc.json, nc.csv, layers.svg and the moments file. Called by `measure` on rank 0."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nc_dist import moments_file
from nc_dist.figures.layers import layer_figure

MOMENTS = "moments.safetensors"


def write(folder: Path, title: str, nc: Mapping[str, Any], file: moments_file.MomentsFile) -> None:
    """All of them, of one model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nc.json").write_text(json.dumps(nc, indent=1))
    write_table(folder, [(None, nc)])
    layer_figure({place: nc[place] for place in file.places}, folder / "layers.svg", title)
    moments_file.save(folder / MOMENTS, file)


def write_table(folder: Path, models: Sequence[tuple[str | None, Mapping[str, Any]]]) -> None:
    """nc.csv: a row for each place (of each model); what has no value is left empty."""
    rows = [
        {**({"model": model} if model else {}), "place": place, **values}
        for model, nc in models
        for place, values in nc.items()
        if isinstance(values, dict)
    ]
    columns = [key for key, value in rows[0].items() if not isinstance(value, dict | list)]
    with (folder / "nc.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
