"""Two hosts joined by a cable: class moments of a gloo group across them are those of one process.

The hosts are network namespaces, which see nothing of each other but the cable. That takes root, and `ip`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from processes import child_env, end

from nc_dist.nc import ClassMoments
from nc_dist.nc.variability import nc1

pytestmark = pytest.mark.slow

CLASSES, DIM, SAMPLES = 12, 48, 400
PORT = "29500"  # the namespaces are ours: nobody else listens there
RANK = """
import os, sys, torch
import torch.distributed as dist
from test_two_hosts import half
from nc_dist.nc import ClassMoments
from nc_dist.world import joined_world

torch.set_num_threads(1)
with joined_world(60) as world:
    for dtype in (torch.float32, torch.float64):
        moments = half(world.rank, dtype).all_reduce(world.sum_)
        torch.save(moments.state_dict(), f"{sys.argv[1]}/{world.rank}-{dtype}.pt")
"""


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 features about means of norm 20, collapsed to 1e-3."""
    random = torch.Generator().manual_seed(0)
    labels_B = torch.randint(CLASSES, (SAMPLES,), generator=random)
    means_KD = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=random, dtype=torch.float64))
    noise_BD = torch.randn(SAMPLES, DIM, generator=random, dtype=torch.float64)
    return 20 * means_KD[labels_B] + 1e-3 * noise_BD, labels_B


def half(rank: int | None, dtype: torch.dtype) -> ClassMoments:
    """Moments of one host's half of the samples, or of all."""
    feats_BD, labels_B = samples()
    rows = slice(None) if rank is None else slice(rank * SAMPLES // 2, (rank + 1) * SAMPLES // 2)
    moments = ClassMoments(CLASSES, DIM, dtype=dtype)
    moments.update(feats_BD[rows].to(dtype), labels_B[rows])
    return moments


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=10)


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Two namespaces: name, network interface, address."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces take root and `ip` (Debian: iproute2)")
    names = [f"nc{os.getpid()}-{rank}" for rank in range(2)]
    cables = [f"nc{rank}v{os.getpid()}"[:15] for rank in range(2)]  # names of interfaces have 15 characters at most
    addresses = ["10.123.0.1", "10.123.0.2"]
    with ExitStack() as stack:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as why:
                pytest.skip(f"no network namespace can be made here: {why.stderr.strip()}")
            stack.callback(ip, "netns", "delete", name)  # and the cable with it
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for name, cable, address in zip(names, cables, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            for device in ("lo", cable):
                ip("-n", name, "link", "set", device, "up")
        yield list(zip(names, cables, addresses, strict=True))


def run_on(hosts: list[tuple[str, str, str]], out: Path, timeout: float = 90) -> None:
    """One rank on each host, as torchrun starts them; those that do not end in time are ended."""
    group = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": hosts[0][2], "MASTER_PORT": PORT}
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, str(Path(here).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    ranks = []
    try:
        for rank, (name, cable, _) in enumerate(hosts):
            env = child_env(RANK=str(rank), GLOO_SOCKET_IFNAME=cable, PYTHONPATH=paths, **group)
            command = ["ip", "netns", "exec", name, sys.executable, "-c", RANK, str(out)]
            with (out / f"{rank}.log").open("w") as log:
                ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
        for rank, process in enumerate(ranks):
            said = out / f"{rank}.log"
            try:
                assert process.wait(timeout) == 0, said.read_text()
            except subprocess.TimeoutExpired:
                pytest.fail(f"rank {rank} did not end within {timeout} s\n{said.read_text()}")
    finally:
        for process in ranks:
            end(process.pid, grace=1)


def test_moments_over_two_hosts_are_those_of_one_process(hosts: list[tuple[str, str, str]], tmp_path: Path) -> None:
    run_on(hosts, tmp_path)
    for dtype, error in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        states = [torch.load(tmp_path / f"{rank}-{dtype}.pt") for rank in range(2)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        found = ClassMoments.from_state_dict(states[0]).statistics()
        expected = half(None, dtype).statistics()
        assert found.num_samples == SAMPLES and torch.equal(found.n_K, expected.n_K)
        for name in ("means_KD", "scatter_DD", "within_K", "quantum_D"):
            value = getattr(expected, name)
            assert (getattr(found, name) - value).norm() <= error * value.norm(), name
        assert nc1(found) == pytest.approx(nc1(expected), rel=error)
