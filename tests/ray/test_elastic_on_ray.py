"""An elastic run on a cluster that loses a node and gets another: the curve of 2 -> 1 -> 2 workers is that of one."""

from __future__ import annotations

import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import FP64, SMALL, curve, relative, rows, started, wait_for

pytestmark = pytest.mark.slow

WORKERS = ["launch.workers={min: 1, max: 2, look_s: 3}"]
SETTINGS = [*FP64["ce"], "epochs=400", "measure_every=4000", "save_every=10"]
ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    # how soon the head takes a node for dead
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs and two nodes of one; no client joins it in this process."""
    folder = Path(tempfile.mkdtemp(prefix="nc-", dir="/tmp"))  # short: Ray puts sockets into it
    for name, value in {**ENV, "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": str(folder)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 10**8})
    try:
        made.first = made.add_node(num_cpus=1, object_store_memory=10**8)
        made.second = made.add_node(num_cpus=1, object_store_memory=10**8)
        yield made
    finally:
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def step_of(out: Path) -> int:
    return int(last[0]["step"]) if (last := rows(out)[-1:]) else -1


def groups(out: Path) -> list[int]:
    """How many workers trained in each group that was started."""
    path = out / "notices.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.split(" train")[0].split()[-1]) for line in lines if "workers started" in line]


def in_order(groups: list[int], *sizes: int) -> bool:
    """Whether groups of these sizes were started one after another; a machine under load may start more in between."""
    left = iter(groups)
    return all(size in left for size in sizes)


def test_a_node_goes_and_another_comes_and_the_curve_is_that_of_one_process(cluster: Any, tmp_path: Path) -> None:
    out, log = tmp_path / "elastic", tmp_path / "log"
    env = {"RAY_ADDRESS": cluster.address}
    with started(log, "pretrain", SMALL, f"out={out}", *SETTINGS, *WORKERS, "--on", "ray", env=env) as driver:
        wait_for(lambda: step_of(out) >= 15 and groups(out), 120, "15 steps", driver)
        assert groups(out)[0] == 2
        cluster.remove_node(cluster.second, allow_graceful=False)
        left = step_of(out)
        wait_for(lambda: in_order(groups(out), 2, 1), 120, "a group on one node", driver)
        wait_for(lambda: step_of(out) >= left + 20, 120, "steps on one node", driver)
        cluster.add_node(num_cpus=1, object_store_memory=10**8)
        wait_for(lambda: in_order(groups(out), 2, 1, 2), 120, "a group on two nodes", driver)
        grown = step_of(out)
        wait_for(lambda: step_of(out) >= grown + 20, 120, "steps on two nodes again", driver)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(60) == 75, log.read_text()[-4000:]
    said = log.read_text()
    assert "worker 1 died" in said or "worker 0 died" in said, "the console tells what happened"
    assert "1 workers started, 1 train" in said

    alone, log = tmp_path / "alone", tmp_path / "log of one"
    with started(log, "pretrain", SMALL, f"out={alone}", *SETTINGS, "--on", "here") as process:
        wait_for(lambda: step_of(alone) >= step_of(out), 120, "as many steps", process)
    found, expected = curve(out), curve(alone)
    assert list(found) == list(range(1, len(found) + 1)), "no step twice, none left out"
    assert max(relative(loss, expected[step]) for step, loss in found.items()) < 1e-9
