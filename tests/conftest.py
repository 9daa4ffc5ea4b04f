"""Session fixtures: small shards, a finished run, a Ray head. The functions behind them are in processes.py."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import FP64, SMALL, Head, child_env, cli, end, free_ports, said, wait_for

ALONE = ("ray", "parity", "cluster")  # many processes and clocks: one such test at a time
UNEVEN = (60, 45, 40, 36, 33, 30, 28, 25, 23, 20)  # samples of each digit


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup`: one process has the folders ALONE, the others a file at a time."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in (*ALONE, "dist", "journeys"):
            item.add_marker(pytest.mark.slow)  # they start processes
        item.add_marker(pytest.mark.xdist_group("alone" if folder in ALONE else str(item.path)))


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """340 digits in four shards, the classes uneven."""
    from nc_dist.data import shards
    from nc_dist.data.catalog import open_source

    source = open_source("digits:train")
    chosen = [np.flatnonzero(source.labels == k)[:n] for k, n in enumerate(UNEVEN)]
    out = tmp_path_factory.mktemp("data") / "uneven"
    for _ in shards.build(source, out, samples_per_shard=90, positions=np.sort(np.concatenate(chosen))):
        pass
    return out


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Iterator[Path]:
    """A small pre-trained model, torch engine, one process; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "source"
    done = cli("pretrain", SMALL, f"out={out}", f"data.train={small_shards}", "epochs=4", "--on", "here")
    assert done.returncode == 0, said(done)
    yield out


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small pre-train in fp64 and one process, for each loss: every launcher's reference; tests only read it."""
    outs = {}
    for loss, settings in FP64.items():
        outs[loss] = tmp_path_factory.mktemp("parity") / loss
        done = cli("pretrain", SMALL, f"out={outs[loss]}", *settings)
        assert done.returncode == 0, said(done)
    return outs


@pytest.fixture(scope="session")
def ray_head() -> Iterator[Head]:
    """A head with two CPUs, token authentication, private ports and session folder, for the whole session."""
    folder = Path(tempfile.mkdtemp(prefix="nc-", dir="/tmp"))  # short: Ray puts sockets into it
    (folder / "token").write_text(secrets.token_hex(32))
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "node-manager-port")
    names += ("metrics-export-port", "ray-client-server-port", "object-manager-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = ["--head", "--block", "--num-cpus=2", "--object-store-memory=200000000", f"--temp-dir={folder}/ray"]
    options += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    options += [f"--{name}={port}" for name, port in ports.items()]
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    log = folder / "head.log"
    with log.open("wb") as file:
        command = [str(Path(sys.executable).with_name("ray")), "start", *options]
        process = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=folder, env=child_env(**auth), start_new_session=True
        )
    try:
        wait_for(lambda: b"Ray runtime started" in log.read_bytes(), 90, f"a Ray head; see {log}", process)
        address = {
            "RAY_ADDRESS": f"127.0.0.1:{ports['port']}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}",
        }
        yield Head(process, {**auth, **address, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}, log)
    finally:
        end(process.pid, grace=3)
    shutil.rmtree(folder, ignore_errors=True)
