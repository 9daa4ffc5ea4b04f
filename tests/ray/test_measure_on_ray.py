"""NC of a model measured by two Ray workers is that of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import ROOT, SMALL, cli, read_json, said

CONFIG = ROOT / "configs/measure/digits.yaml"


@pytest.mark.slow
def test_two_workers_measure_what_one_process_measures(tmp_path: Path) -> None:
    source = tmp_path / "source"
    assert cli("pretrain", SMALL, f"out={source}", "--on", "here").returncode == 0
    how = [f"model={source}", "per_class=30", "batch=50", "rank_per_class=10"]
    one = cli("measure", CONFIG, f"out={tmp_path / 'one'}", *how, "--on", "here")
    two = cli("measure", CONFIG, f"out={tmp_path / 'two'}", *how, "launch.workers=2", "--on", "ray")
    assert one.returncode == 0, said(one)
    assert two.returncode == 0, said(two)
    assert read_json(tmp_path / "two/result.json")["world_size"] == 2
    alone, together = (read_json(tmp_path / name / "nc.json") for name in ("one", "two"))
    assert list(alone) == list(together)
    for place in ("layer1.0", "before", "after"):
        for name, value in alone[place].items():
            if isinstance(value, float):
                assert together[place][name] == pytest.approx(value, rel=1e-5), f"{place} {name}"
