"""A sweep on paper: which runs its grid makes, in which order, and what is done about failing ones."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nc_dist.config import SweepRun
from nc_dist.errors import InputError, Preempted
from nc_dist.run_folder import write_result
from nc_dist.sweep import Trial, expand, run_here, unfinished

BASE = {
    "source": "runs/ce",
    "data": {"train": "digits"},
    "method": {"kind": "full"},
    "optim": {"kind": "sgd", "lr": 0.1},
}


def trees(grid: dict[str, list[Any]], base: dict[str, Any] = BASE) -> list[dict[str, Any]]:
    return expand(SweepRun(out="o", base=base, grid=grid))


def test_a_grid_makes_every_combination_in_a_stable_order() -> None:
    found = trees({"seed": [0, 1], "data.train": ["digits", "mnist5k"], "optim.lr": [1, 2]})
    cells = [(t["seed"], t["data"]["train"], t["optim"]["lr"]) for t in found]
    assert cells == [(s, d, lr) for s in (0, 1) for d in ("digits", "mnist5k") for lr in (1, 2)]
    assert all(t["source"] == "runs/ce" for t in found)


def test_a_kind_in_the_grid_goes_first_so_that_its_block_starts_anew() -> None:
    found = trees({"optim.lr": [1, 2], "optim.kind": ["sgd", "adamw"]}, {"optim": {"kind": "sgd", "momentum": 0.5}})
    assert [t["optim"] for t in found] == [
        {"kind": "sgd", "momentum": 0.5, "lr": 1},
        {"kind": "sgd", "momentum": 0.5, "lr": 2},
        {"kind": "adamw", "lr": 1},
        {"kind": "adamw", "lr": 2},
    ]


def test_trials_share_nothing_that_one_could_change_in_another() -> None:
    """A whole block from the grid, with a key inside it from the grid as well."""
    grid = {"method": [{"kind": "layer_ft"}], "method.block": ["layer1.0", "layer2.0"]}
    assert [t["method"]["block"] for t in trees(grid)] == ["layer1.0", "layer2.0"]
    assert grid["method"] == [{"kind": "layer_ft"}]


def test_the_base_is_left_as_it_is() -> None:
    before = repr(BASE)
    trees({"optim.lr": [5], "method.kind": ["scl_ft"]})
    assert repr(BASE) == before


@pytest.mark.parametrize("grid, said", [({}, "the grid itself"), ({"seed": [], "optim.lr": [1]}, r"\['seed'\]")])
def test_an_empty_grid_is_refused(grid: dict[str, list[Any]], said: str) -> None:
    with pytest.raises(InputError, match=f"grid: needs at least one key, each with values; empty: {said}"):
        trees(grid)


def trial(out: Path) -> Trial:
    return Trial(out.name, SimpleNamespace(out=str(out)))  # type: ignore[arg-type]


def test_a_trial_is_finished_when_it_has_a_result(tmp_path: Path) -> None:
    both = [trial(tmp_path / name) for name in ("a", "b")]
    (tmp_path / "a").mkdir()
    write_result(tmp_path / "a", {"accuracy": 1})
    assert [t.id for t in unfinished(both)] == ["b"]


def test_a_failing_trial_is_tried_again_and_then_left_behind(tmp_path: Path) -> None:
    tried: list[str] = []

    def run(spec: Any) -> None:
        tried.append(Path(spec.out).name)
        if tried[-1] == "bad" or (tried[-1] == "shaky" and tried.count("shaky") == 1):
            raise RuntimeError

    run_here([trial(tmp_path / name) for name in ("bad", "shaky", "good")], 1, run)
    assert tried == ["bad", "bad", "shaky", "shaky", "good"]


@pytest.mark.parametrize(("error", "tries"), [(InputError("x"), 1), (Preempted(3), 1), (RuntimeError("x"), 3)])
def test_bad_input_is_not_tried_again_and_a_stop_passes_through(tmp_path: Path, error: Exception, tries: int) -> None:
    tried: list[str] = []

    def run(spec: Any) -> None:
        tried.append(spec.out)
        raise error

    with pytest.raises(Preempted) if isinstance(error, Preempted) else nullcontext():
        run_here([trial(tmp_path / "one")], 2, run)
    assert len(tried) == tries
