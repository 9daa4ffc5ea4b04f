"""`nc-dist nc`: what it prints is what the moments give, and bad input is one error and exit code 2."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from nc_dist.cli import app
from nc_dist.moments_file import MomentsFile, load, merge, save, summaries
from nc_dist.nc import HalvedMoments

CLASSES = 3


def nc(*words: object) -> Result:
    return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(app, ["nc", *map(str, words)])


def printed(*words: object) -> str:
    result = nc(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def write(path: Path, seed: int, dims: dict[str, int], classes: int = CLASSES, num: int = 60) -> MomentsFile:
    """A file of random features about class means; the last place has a classifier."""
    random = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(num) % classes
    places = {}
    for place, dim in dims.items():
        means_KD = 3 * torch.randn(classes, dim, generator=random)
        places[place] = HalvedMoments(classes, dim)
        places[place].update(means_KD[labels_N] + torch.randn(num, dim, generator=random), labels_N)
    last = list(dims)[-1]
    data = [{"name": f"digits part {seed}", "identity": "abcd", "subset": seed, "samples": num}]
    about = {
        "class_names": [f"c{k}" for k in range(classes)],
        "model": {"name": "some net", "identity": "0"},
        "data": data,
    }
    weight_KD = torch.randn(classes, dims[last], generator=torch.Generator().manual_seed(0))
    file = MomentsFile(places, {last: (weight_KD, None)}, about)
    save(path, file)
    return file


@pytest.fixture
def a(tmp_path: Path) -> Path:
    write(tmp_path / "a", 1, {"stem": 4, "after": 8})
    return tmp_path / "a"


@pytest.fixture
def b(tmp_path: Path) -> Path:
    write(tmp_path / "b", 2, {"stem": 4, "after": 8}, num=30)
    return tmp_path / "b"


def table(text: str) -> list[list[str]]:
    """The rows of the table in it, with the heading."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("place "))
    width = len(lines[start].split())
    rows = [line.split() for line in lines[start:]]
    return [row for row in rows if len(row) == width and row[0] in ("place", "stem", "after")]


def test_merged_files_are_the_exact_merge_of_all(a: Path, b: Path, tmp_path: Path) -> None:
    write(tmp_path / "c", 3, {"stem": 4, "after": 8}, num=9)
    out = tmp_path / "new" / "all"
    assert printed("merge", a, b, tmp_path / "c", "-o", out) == f"{out}: 99 samples at 2 places\n"
    save(tmp_path / "expected", merge(merge(load(a), load(b)), load(tmp_path / "c")))
    assert out.read_bytes() == (tmp_path / "expected").read_bytes()
    assert [entry["samples"] for entry in load(out).about["data"]] == [60, 30, 9]


def test_show_as_json_is_every_metric_of_every_place(a: Path) -> None:
    found = json.loads(printed("show", a, "--json"))
    assert found == json.loads(json.dumps(summaries(load(a))))
    assert list(found) == ["stem", "after"] and found["after"]["nc3_zhu"] is not None
    alone = json.loads(printed("show", a, "--json", "--place", "after"))
    assert alone == {"after": found["after"]}


def test_show_prints_a_row_for_each_place_and_a_dash_where_there_is_no_value(a: Path) -> None:
    text = printed("show", a)
    assert text.splitlines()[0] == f"{a}: some net on digits part 1 (60 samples)"
    heading, *rows = table(text)
    assert heading[:10] == ["place", "d", "K", "rank", "N", "n", "nc1", "null", "floor", "split-half"]
    assert [row[:6] for row in rows] == [["stem", "4", "3", "2", "60", "20"], ["after", "8", "3", "2", "60", "20"]]
    names = {"null": "nc1_null", "floor": "nc1_floor", "split-half": "nc1_split_half"}
    for row, (place, values) in zip(rows, summaries(load(a)).items(), strict=True):
        for column, cell in zip(heading[6:], row[6:], strict=True):
            value = values[names.get(column, column)]
            assert cell == ("-" if value is None else f"{value:.4g}"), (place, column)
    stem, after = (dict(zip(heading, row, strict=True)) for row in rows)
    assert stem["nc1_pca"] == stem["nc3_zhu"] == "-"
    assert after["nc1_pca"] != "-" and after["nc3_zhu"] != "-"


def test_show_gives_every_reason_and_warning_once_with_its_places(tmp_path: Path) -> None:
    file = write(tmp_path / "few", 1, {"stem": 4, "middle": 4, "after": 8}, num=12)
    warned = {place: values["warnings"] for place, values in summaries(file).items()}
    notes = printed("show", tmp_path / "few").splitlines()[5:]
    assert "nc3_zhu, nc3_bias: no classifier [stem, middle]" in notes
    assert "nc1_pca: not comparable: d = 4 is less than d0 = 2K = 6 [stem, middle]" in notes
    assert sum("no classifier" in note for note in notes) == 1
    assert len(notes) == len(set(notes)) and not any("nc3_papyan" in note for note in notes)
    found = [(warning, place) for place, warnings in warned.items() for warning in warnings]
    assert found and all(f"{warning} [{place}]" in notes for warning, place in found)


def test_show_says_every_place_and_the_range_of_class_sizes(tmp_path: Path) -> None:
    write(tmp_path / "x", 1, {"stem": 4, "after": 4}, num=61)
    text = printed("show", tmp_path / "x")
    assert [row[5] for row in table(text)[1:]] == ["20-21", "20-21"]
    assert "nc1_pca: not comparable: d = 4 is less than d0 = 2K = 6 [every place]" in text


def test_show_says_why_a_place_has_no_rank(tmp_path: Path) -> None:
    write(tmp_path / "one", 1, {"stem": 4}, classes=1)
    text = printed("show", tmp_path / "one")
    assert table(text)[1][:6] == ["stem", "4", "1", "-", "60", "60"]
    assert "nc1, rank, nc1_null" in text


def test_diff_as_json_has_both_values_their_difference_and_ratio(a: Path, b: Path) -> None:
    found = json.loads(printed("diff", a, b, "--json"))
    ours, theirs = (summaries(load(path)) for path in (a, b))
    assert found["A"] == found["B"] == [] and list(found["places"]) == ["stem", "after"]
    for place, of in found["places"].items():
        assert of["comparable"] and of["K"] == [3, 3] and of["N"] == [60, 30] and of["n_min"] == [20, 10]
        for name, pair in of["metrics"].items():
            x, y = ours[place][name], theirs[place][name]
            assert (pair["A"], pair["B"]) == (x, y)
            expected = (None, None) if x is None or y is None else (y - x, y / x if x else None)
            assert (pair["difference"], pair["ratio"]) == expected, name
        assert {"nc1", "cdnv", "nc3_zhu", "nc1_split_half"} <= of["metrics"].keys()
        assert not {"N", "d", "reasons", "warnings"} & of["metrics"].keys()


def test_diff_prints_a_row_for_each_metric_with_a_value(a: Path, b: Path) -> None:
    text = printed("diff", a, b)
    assert text.startswith(f"A = {a}: some net on digits part 1 (60 samples)\nB = {b}: some net on digits part 2 (30")
    heading, *rows = [line.split("  ") for line in text.splitlines() if line.startswith(("place", "stem", "after"))]
    assert [cell.strip() for cell in heading if cell] == ["place", "metric", "A", "B", "B - A", "B / A"]
    cells = {tuple(row[:2]): row[2:] for row in ([c.strip() for c in row if c.strip()] for row in rows)}
    pairs = json.loads(printed("diff", a, b, "--json"))["places"]
    for place, of in pairs.items():
        for name, pair in of["metrics"].items():
            if pair["A"] is None and pair["B"] is None:
                assert (place, name) not in cells
            else:
                assert cells[place, name] == ["-" if v is None else f"{v:.4g}" for v in pair.values()]
    assert ("stem", "nc3_zhu") not in cells and ("after", "nc3_zhu") in cells


def test_a_value_in_one_file_only_has_no_difference_and_its_reason_is_told(a: Path, tmp_path: Path) -> None:
    file = load(a)
    save(tmp_path / "bare", replace(file, classifiers={}))
    of = json.loads(printed("diff", a, tmp_path / "bare", "--json"))["places"]["after"]["metrics"]["nc3_papyan"]
    assert of["A"] is not None and of["B"] is of["difference"] is of["ratio"] is None
    lines = printed("diff", a, tmp_path / "bare").splitlines()
    told = [line for line in lines if "no classifier" in line]
    assert len(told) == 1 and told[0].startswith("B: nc2_equinorm_weight, ") and told[0].endswith("classifier [after]")


def test_a_ratio_to_zero_is_none() -> None:
    from nc_dist.cli.nc import compare

    sizes = {"K": 2, "d": 3, "K_empty": 0, "N": 9, "n_min": 4, "n_max": 5, "reasons": {}, "warnings": []}
    pair = compare({"p": {**sizes, "nc1": 0.0}}, {"p": {**sizes, "nc1": 2.0}})["places"]["p"]["metrics"]["nc1"]
    assert pair == {"A": 0.0, "B": 2.0, "difference": 2.0, "ratio": None}


def test_places_in_one_file_only_are_named(a: Path, tmp_path: Path) -> None:
    write(tmp_path / "deep", 2, {"stem": 4, "layer1": 6, "layer2": 6})
    found = json.loads(printed("diff", a, tmp_path / "deep", "--json"))
    assert found["A"] == ["after"] and found["B"] == ["layer1", "layer2"] and list(found["places"]) == ["stem"]
    lines = printed("diff", a, tmp_path / "deep").splitlines()
    assert "only in A: after" in lines and "only in B: layer1, layer2" in lines


@pytest.mark.parametrize(
    "dims, classes, sizes, pca",
    [
        ({"stem": 4, "after": 12}, 3, "(K, d) = (3, 8) and (3, 12)", True),
        ({"stem": 4, "after": 8}, 2, "(K, d) = (3, 8) and (2, 8)", False),
    ],
)
def test_places_of_another_size_are_not_compared_but_for_nc1_pca_at_one_number_of_classes(
    a: Path, tmp_path: Path, dims: dict[str, int], classes: int, sizes: str, pca: bool
) -> None:
    write(tmp_path / "b", 2, dims, classes=classes)
    of = json.loads(printed("diff", a, tmp_path / "b", "--json"))["places"]["after"]
    assert not of["comparable"]
    compared = {name for name, pair in of["metrics"].items() if pair["difference"] is not None}
    assert compared == ({"nc1_pca"} if pca else set())
    assert of["metrics"]["nc1"]["A"] is not None and of["metrics"]["nc1"]["B"] is not None
    assert f"after: not comparable, {sizes}" in printed("diff", a, tmp_path / "b").splitlines()


@pytest.mark.parametrize(
    "words, said",
    [
        (("show", "{tmp}/none"), "none: no such file"),
        (("show", "{tmp}/text"), "text: not a whole moments file of version 1"),
        (("show", "{a}", "--place", "layer9"), "--place layer9: {a} has stem, after"),
        (("diff", "{a}", "{tmp}/none"), "none: no such file"),
        (("diff", "{tmp}/text", "{a}"), "text: not a whole moments file"),
        (("merge", "{a}", "-o", "{tmp}/out"), "{a}: one file is nothing to merge"),
        (("merge", "{a}", "{b}", "-o", "{b}"), "--out {b}: is one of the files to merge"),
        (("merge", "{a}", "{b}", "-o", "{tmp}/link"), "link: is one of the files to merge"),
        (("merge", "{a}", "{a}", "-o", "{tmp}/out"), "{a}: cannot merge, both are of all samples"),
        (("merge", "{a}", "{b}", "{tmp}/wide", "-o", "{tmp}/out"), "wide: cannot merge, (K, D, blocks, dtype) of"),
        (("merge", "{a}", "{tmp}/none", "-o", "{tmp}/out"), "none: no such file"),
        (("merge", "{a}", "{b}", "-o", "{tmp}/text/out"), "text"),
    ],
)  # fmt: skip
def test_bad_input_is_one_error_and_exit_code_2(
    words: tuple[str, ...], said: str, a: Path, b: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("no moments " * 10)
    (tmp_path / "link").symlink_to(a)
    write(tmp_path / "wide", 3, {"stem": 4, "after": 9})
    before: dict[str, Any] = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    names = {"a": a, "b": b, "tmp": tmp_path}
    result = nc(*(word.format(**names) for word in words))
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and said.format(**names) in result.stderr
    assert result.stderr.count("\n") == 1
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("words", [("merge", "x", "y"), ("diff", "x"), ("show",), ("nonsense",)])
def test_a_wrong_command_line_is_exit_code_2(words: tuple[str, ...]) -> None:
    result = nc(*words)
    assert result.exit_code == 2 and result.stderr
