"""`nc-dist nc merge|show|diff`: moments files, and the metrics they give without model or data. It parses and prints.

Heavy imports stay inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from nc_dist.errors import BAD_INPUT, InputError

nc_app = typer.Typer(no_args_is_help=True, help="Merge, show and compare moments files, without model or data.")

COLUMNS = {  # of `show`: metric and heading
    "nc1": "nc1",
    "nc1_null": "null",
    "nc1_floor": "floor",
    "nc1_split_half": "split-half",
    "nc1_pca": "nc1_pca",
    "nc1_trace": "nc1_trace",
    "cdnv": "cdnv",
    "vci": "vci",
    "nc2_etf": "nc2_etf",
    "nc3_zhu": "nc3_zhu",
    "nc3_bias": "nc3_bias",
    "h_score": "h_score",
    "logme": "logme",
}
SIZES = ("K", "d", "K_empty", "N", "n_min", "n_max")
AT_ANY_DIM = "nc1_pca"  # is made to be compared over d, at one K

Summaries = Mapping[str, dict[str, Any]]  # by place
File = Annotated[Path, typer.Argument(help="A moments file.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print all there is, as one JSON object.")]


@nc_app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Two or more, of other samples each.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.", show_default=False)],
) -> None:
    """Add up the moments of one model on several parts of the data, exactly."""
    with _told():
        if len(files) < 2:
            raise InputError(f"{files[0]}: one file is nothing to merge; give two or more")
        if out.resolve() in [path.resolve() for path in files]:
            raise InputError(f"--out {out}: is one of the files to merge; choose another name")
        from nc_dist import moments_file

        merged = moments_file.load(files[0])
        for path in files[1:]:
            part = moments_file.load(path)
            try:
                merged = moments_file.merge(merged, part)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
        moments_file.save(out, merged)
    samples = max((int((of.first.n_K + of.second.n_K).sum()) for of in merged.places.values()), default=0)
    typer.echo(f"{out}: {samples} samples at {len(merged.places)} places")


@nc_app.command()
def show(
    file: File,
    as_json: AsJson = False,
    place: Annotated[str | None, typer.Option(help="This one alone.", show_default=False)] = None,
) -> None:
    """Every metric of every place.  Example: nc-dist nc show moments.safetensors --place layer4.1"""
    with _told():
        title, values = _read(file, place)
    if as_json:
        typer.echo(json.dumps(values, indent=1))
        return
    rows = [["place", "d", "K", "rank", "N", "n", *COLUMNS.values()]]
    for name, of in values.items():
        n = str(of["n_min"]) + (f"-{of['n_max']}" if of["n_max"] > of["n_min"] else "")
        sizes = [str(of["d"]), str(of["K"]), _number(of["rank"]), str(of["N"]), n]
        rows.append([name, *sizes, *(_number(of[key]) for key in COLUMNS)])
    cells = {(name, key) for name in values for key in ("rank", *COLUMNS)}
    typer.echo("\n".join([title, *_table(rows, texts=1), *_notes(values, cells)]))


@nc_app.command()
def diff(a: File, b: File, as_json: AsJson = False) -> None:
    """Every metric of two files side by side.  Example: nc-dist nc diff before.safetensors after.safetensors"""
    with _told():
        (title_a, values_a), (title_b, values_b) = _read(a), _read(b)
    found = compare(values_a, values_b)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    rows = [["place", "metric", "A", "B", "B - A", "B / A"]]
    notes = [f"only in {key}: {', '.join(found[key])}" for key in ("A", "B") if found[key]]
    for place, of in found["places"].items():
        for name, pair in of["metrics"].items():
            if pair["A"] is not None or pair["B"] is not None:
                rows.append([place, name, *map(_number, pair.values())])
        if not of["comparable"]:
            notes.append(f"{place}: not comparable, (K, d) = {(of['K'][0], of['d'][0])} and {(of['K'][1], of['d'][1])}")
    cells = {(place, name) for place, name, *_ in rows}
    for key, values in (("A", values_a), ("B", values_b)):
        both = {place: values[place] for place in found["places"]}
        notes += [f"{key}: {note}" for note in _notes(both, cells)]
    typer.echo("\n".join([f"A = {title_a}", f"B = {title_b}", *_table(rows, texts=2), *notes]))


def compare(a: Summaries, b: Summaries) -> dict[str, Any]:
    """Two files' summaries: {A, B: places that only this one has, places: {..}}, ready for JSON.

    A place has its sizes in both, whether they are `comparable`, and by metric {A, B, difference B - A, ratio B / A}.
    Difference and ratio are None where there is none, and where K or d differ; `nc1_pca` may be compared over d.
    """
    places = {}
    for place in (place for place in a if place in b):
        of_a, of_b = a[place], b[place]
        same_K, same_d = (of_a[size] == of_b[size] for size in ("K", "d"))
        metrics = {}
        for name in (name for name in of_a if name not in (*SIZES, "reasons", "warnings")):
            x, y = of_a[name], of_b[name]
            fit = x is not None and y is not None and same_K and (same_d or name == AT_ANY_DIM)
            difference, ratio = (y - x if fit else None), (y / x if fit and x else None)
            metrics[name] = {"A": x, "B": y, "difference": difference, "ratio": ratio}
        sizes = {size: [of_a[size], of_b[size]] for size in SIZES}
        places[place] = {**sizes, "comparable": same_K and same_d, "metrics": metrics}
    only_a, only_b = [place for place in a if place not in b], [place for place in b if place not in a]
    return {"A": only_a, "B": only_b, "places": places}


def _read(path: Path, place: str | None = None) -> tuple[str, Summaries]:
    """A line on what the file is of, and the summaries of all its places, or of one."""
    from nc_dist.moments_file import MomentsFile, load, summaries

    file = load(path)
    if place is not None:
        if place not in file.places:
            raise InputError(f"--place {place}: {path} has {', '.join(file.places)}")
        given = {name: classifier for name, classifier in file.classifiers.items() if name == place}
        file = MomentsFile({place: file.places[place]}, given, file.about)
    data = ", ".join(f"{entry.get('name')} ({entry.get('samples')} samples)" for entry in file.about.get("data", []))
    return f"{path}: {file.about.get('model', {}).get('name')} on {data}", summaries(file)


def _notes(values: Summaries, cells: Collection[tuple[str, str]]) -> list[str]:
    """Why some of the cells (place, metric) have no value, and all warnings: each once, with the places it is of."""
    places: dict[str, list[str]] = {}
    for place, of in values.items():
        why = {name: reason for name, reason in of["reasons"].items() if (place, name) in cells}
        lines = [f"{', '.join(n for n in why if why[n] == reason)}: {reason}" for reason in dict.fromkeys(why.values())]
        for line in [*lines, *of["warnings"]]:
            places.setdefault(line, []).append(place)
    every = len(values) if len(values) > 1 else None
    return [f"{line} [{'every place' if len(of) == every else ', '.join(of)}]" for line, of in places.items()]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(rows: Sequence[Sequence[str]], texts: int) -> list[str]:
    """Lines of aligned columns: the first `texts` to the left, the others, numbers, to the right."""
    columns = []
    for i, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if i < texts else cell.rjust(width) for cell in column])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]


@contextmanager
def _told() -> Iterator[None]:
    """What the user can mend is told in one line, exit code 2."""
    try:
        yield
    except (InputError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None
