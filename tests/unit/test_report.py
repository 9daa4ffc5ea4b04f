"""The report: what is read, what is counted, what the files hold, and how the page shows in a browser."""

import csv
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nc_dist.report import collect, write_report
from nc_dist.report.html import DASH, Point, short, spread
from nc_dist.report.tables import correlation

METHODS = {"linear_probe": 0.05, "scl_ft": 6.5, "full": 100.0}
CHROMIUM = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
CHROMIUM += ["--disable-component-update", "--disable-sync"]


def write(path: Path, row: dict[str, Any], **changes: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row | changes))


def source(variant: str, nc1: float) -> dict[str, Any]:
    nc = {
        "nc1": nc1,
        "nc1_null": 8.5,
        "nc1_split_half": 0.12,
        "nc1_trace": 2 * nc1,
        "nc3_zhu": None,
        "d": 64,
        "K": 10,
        "N": 2000,
    }
    sites = ("train_before", "train_after", "heldout_before", "heldout_after")
    return {
        "journey": "pretrain", "variant": variant, "loss": "ce", "head": "mlp", "backbone": "small",
        "epochs": 3, "seed": 0, "nc1_source": nc1, "source_accuracy": 0.912, "source_ncc_accuracy": None,
        "seconds": 12.0, "world_size": 2, "engine": "deepspeed zero-2", "nc": dict.fromkeys(sites, nc),
    }  # fmt: skip


def trial(variant: str, dataset: str, method: str, seed: int, accuracy: float) -> dict[str, Any]:
    return {
        "journey": "finetune", "variant": variant, "dataset": dataset, "method": method, "seed": seed,
        "accuracy": accuracy, "metric": "top1", "nc1_source": 0.5, "nc1_downstream": None,
        "nc1_train_before": 2.5, "trainable_percent": METHODS[method], "seconds": 1.5, "train_samples": 400,
        "nc": {"train_before": {"nc1": 2.5, "d": 64, "K": 10, "N": 200}}, "shots": None,
        "trial": f"{variant}-{dataset}-{method}-{seed}",
    }  # fmt: skip


def write_runs(folder: Path) -> Path:
    """Two variants, two data sets, three methods, two seeds; `full` was not run on pets."""
    for number, variant in enumerate(("ce", "supcon<1>")):
        write(folder / f"pretrain/{number}/result.json", source(variant, 0.5 + number))
        for dataset in ("digits", "pets"):
            for order, method in enumerate(METHODS):
                for seed in (0, 1):
                    if (dataset, method) != ("pets", "full"):
                        row = trial(variant, dataset, method, seed, 0.6 + 0.1 * order + 0.02 * seed)
                        write(folder / f"trials/{row['trial']}/result.json", row)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return write_runs(tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a written report, to be read only."""
    folder = tmp_path_factory.mktemp("report")
    write_report(write_runs(folder), folder)
    return folder


def markdown(folder: Path) -> str:
    return Path(str(write_report(folder, folder / "report")["markdown"])).read_text("utf-8")


def table_row(text: str, *start: str) -> list[str]:
    """The cells of the one Markdown table row that begins with `start`."""
    (line,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(start) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_collect_tells_sources_from_trials(runs: Path) -> None:
    ledger = collect(runs)
    assert [row["variant"] for row in ledger.sources] == ["ce", "supcon<1>"]
    assert len(ledger.trials) == 20
    assert ledger.problems == []


def test_nothing_is_dropped_silently(runs: Path) -> None:
    (runs / "trials/torn").mkdir()
    (runs / "trials/torn/result.json").write_text('{"journey": "finetu')
    write(runs / "trials/percent/result.json", trial("ce", "digits", "full", 5, 93.1))
    write(runs / "trials/nan/result.json", trial("ce", "digits", "full", 5, float("nan")))
    write(runs / "trials/nameless/result.json", trial("ce", "digits", "full", 5, 0.5), dataset=None)
    write(runs / "measure/result.json", {"journey": "measure"})
    write(runs / "trials/lost/status.json", {"state": "failed", "reason": "out of memory"})
    write(runs / "trials/stopped/status.json", {"state": "preempted", "reason": "SIGTERM"})
    write(runs / "pretrain/0/status.json", {"state": "done"})
    write(runs / "status.json", {"state": "running"})
    write(runs / "sweep/result.json", {"journey": "sweep", "trials": []})

    found = {problem.where: problem for problem in collect(runs).problems}

    assert len(found) == 7
    assert found["trials/torn/result.json"].kind == "broken"
    assert "93.1 is not a fraction" in found["trials/percent/result.json"].reason
    assert found["trials/nan/result.json"].reason == "accuracy: missing"
    assert found["trials/nameless/result.json"].reason == "dataset: None is not a name"
    assert found["measure/result.json"].kind == "not shown"
    assert found["trials/lost"] == ("failed", "trials/lost", "out of memory")
    assert found["trials/stopped"].kind == "preempted"
    counts = write_report(runs, runs / "report")
    assert (counts["trials"], counts["problems"]) == (20, 7)
    assert table_row(markdown(runs), "failed")[-1] == "out of memory"


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        write_report(tmp_path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_data_files_hold_one_row_a_trial(runs: Path) -> None:
    extra = trial("ce", "pets", "full", 0, 0.9)
    write(runs / "trials/extra/result.json", extra, block="layer3.0", curve=[1, 2])
    report = write_report(runs, runs / "report")
    with (runs / "report/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (runs / "report/results.jsonl").read_text().splitlines()]

    assert len(rows) == len(lines) == report["trials"] == 21
    assert list(rows[0])[:8] == [
        "trial", "variant", "dataset", "method", "seed", "shots", "metric", "accuracy",
    ]  # fmt: skip
    assert list(rows[0])[-1] == "block"
    assert "curve" not in rows[0]
    assert rows[0]["nc1_downstream"] == ""
    assert lines[0]["nc1_downstream"] is None
    required = {
        "variant",
        "dataset",
        "method",
        "accuracy",
        "nc1_source",
        "trainable_percent",
        "seconds",
        "trial",
    }
    assert required <= lines[0].keys()


def test_the_markdown_tables_are_right(report: Path) -> None:
    text = (report / "report.md").read_text("utf-8")

    assert text.startswith("# Transfer report (toy scale)")
    sources = table_row(text, "ce", "ce", "mlp")
    assert sources[5:8] == ["91.2", DASH, "0.500 · d 64 · K 10 · N 2000 · null 8.50 · halves ±12 %"]
    assert table_row(text, "ce", "linear_probe") == [
        "ce", "linear_probe", "0.05", "61.0 ± 1.4 (n = 2)", "61.0 ± 1.4 (n = 2)",
    ]  # fmt: skip
    assert table_row(text, "ce", "full")[-1] == DASH
    pair = table_row(text, "full − linear_probe")
    assert pair[1:] == ["+20.0 ± 0.0 (n = 2) · ahead in 2 of 2", DASH]
    assert table_row(text[text.index("## Downstream") :], "ce")[1] == (
        "2.50, probe 61.0 % · d 64 · K 10 · N 200 · null – · halves –"
    )
    assert "n = 2 variants: no correlation is computed" in text
    assert "r = " not in text


def test_shots_and_metrics_are_not_pooled(runs: Path) -> None:
    few = trial("ce", "digits", "full", 0, 0.4)
    write(runs / "trials/few/result.json", few, shots=5)
    write(runs / "trials/classes/result.json", few, metric="mean_per_class")
    write(runs / "trials/again/result.json", few)
    text = markdown(runs)

    header = table_row(text, "Variant", "Method")
    assert header[3:] == ["digits, 5 shots", "digits", "digits, mean per class", "pets"]
    assert "Trials that repeat a cell and its seed: 1;" in text


def test_the_two_sides_of_collapse_share_no_paragraph_and_no_figure(report: Path) -> None:
    text = (report / "report.md").read_text("utf-8")
    source_side = text[text.index("## Source side") : text.index("## Downstream side")]
    downstream_side = text[text.index("## Downstream side") :]
    assert "ownstream" not in source_side
    assert "source" not in downstream_side.lower()


def test_html_is_self_contained_and_escaped(report: Path) -> None:
    page = (report / "report.html").read_text("utf-8")
    loaded: list[str] = []
    alts: list[str | None] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            values = dict(attrs)
            loaded.extend(values[key] or "" for key in ("src", "href", "srcset", "data") if key in values)
            alts.extend([values.get("alt")] if tag == "img" else [])

    Reader().feed(page)
    assert len(alts) == 6
    assert all(alts)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in loaded)
    assert "url(" not in page
    assert "@import" not in page
    assert "supcon&lt;1&gt;" in page
    assert "supcon<1>" not in page
    assert "Nothing here supports or contradicts a claim about ImageNet" in page


def test_the_same_ledger_gives_the_same_files(report: Path, tmp_path: Path) -> None:
    written = write_report(report, tmp_path)
    for kind in ("html", "markdown", "csv", "jsonl"):
        path = Path(str(written[kind]))
        assert path.read_bytes() == (report / path.name).read_bytes()


def test_another_scale_is_named_and_not_called_toy(tmp_path: Path) -> None:
    write(tmp_path / "ce/result.json", source("ce", 0.5) | {"device": "NVIDIA H200"})
    page = Path(str(write_report(tmp_path, tmp_path)["html"])).read_text("utf-8")
    assert "NVIDIA H200" in page
    assert "toy scale" not in page.lower()


def test_correlation_needs_five_variants_of_one_shape() -> None:
    points = [Point(f"v{i}", "full", 10.0**-i, 1 / (1 + 2.0**-i)) for i in range(6)]
    shapes = {point.variant: "d 64" for point in points}
    assert correlation(points[:4], shapes) == "n = 4 variants: no correlation is computed"
    assert correlation(points, shapes).startswith("n = 6 variants: r = -1.00 (95 % interval -1.00 to -1.00;")
    assert "of different shape (d 128; d 64)" in correlation(points, shapes | {"v0": "d 128"})
    flat = [point._replace(accuracy=0.5) for point in points]
    assert correlation(flat, shapes) == "n = 6 variants, all with the same value: no correlation is computed"


def test_numbers_as_text() -> None:
    assert [short(value) for value in (10000, 0.5, 0.12345, 99.96, 123.4, 0.0)] == [
        "10000", "0.500", "0.123", "100", "123", "0.00",
    ]  # fmt: skip
    assert spread([None, True]) == DASH
    assert spread([0.5, None]) == "0.500"
    assert spread([1.0, 3.0]) == "2.00 ± 1.41 (n = 2)"


@pytest.mark.slow
def test_the_page_fits_a_phone_and_loads_nothing(report: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    address = (report / "report.html").resolve().as_uri()
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, chromium_sandbox=False, args=CHROMIUM)
        page = browser.new_page(viewport={"width": 390, "height": 844})
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        tables, images = page.locator("table").all(), page.locator("img").all()
        assert (len(tables), len(images)) == (5, 6)
        assert all(item.is_visible() for item in (*tables, *images))
        assert all(image.evaluate("image => image.naturalWidth > 0") for image in images)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert [url for url in requests if not url.startswith("data:")] == [address]
        browser.close()


def test_runs_that_were_moved_aside_or_replaced_are_named_and_left_out(tmp_path: Path) -> None:
    write(tmp_path / "ce/result.json", source("ce", 0.5))
    write(tmp_path / "ce.20260101-120000/result.json", source("ce", 0.9))
    for name in ("now", "before"):
        write(tmp_path / f"sweep/trials/{name}/result.json", trial("ce", "digits", "full", 0, 0.9))
    write(tmp_path / "sweep/sweep.json", {"trials": ["now"]})
    ledger = collect(tmp_path)
    assert (len(ledger.sources), len(ledger.trials)) == (1, 1)
    assert sorted(problem.reason[:12] for problem in ledger.problems) == ["moved aside ", "no trial of "]
