"""What the tests of killed, stopped and resized runs share: ranks as torchrun starts them, and where a run stands."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from processes import free_ports, rows, started

from nc_dist.config import PretrainRun
from nc_dist.source_set import open_source_set

Rank = tuple["subprocess.Popen[bytes]", Path]


@contextmanager
def ranks(folder: Path, n: int, *args: object) -> Iterator[list[Rank]]:
    """`nc-dist` in n processes that are joined as torchrun joins them, and what each of them says."""
    (port,) = free_ports(1)
    with ExitStack() as stack:
        group = []
        for rank in range(n):
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            log = folder / f"rank_{rank}_of_{n}.log"
            group.append((stack.enter_context(started(log, *args, env=env)), log))
        yield group


def step_of(out: Path) -> int:
    """The newest step that a run has told of, -1 before the first."""
    return int(last[0]["step"]) if (last := rows(out)[-1:]) else -1


def assert_samples_exact(run: PretrainRun) -> None:
    """Over all ranks, every step so far read the very samples that the order names, each of them once."""
    data = open_source_set(run)
    read: dict[int, list[str]] = {}
    for path in Path(run.out).glob("samples/rank_*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            read.setdefault(row["step"], []).extend(row["keys"])
    assert sorted(read) == list(range(1, len(read) + 1)) and len(read) >= step_of(Path(run.out))
    for step, keys in read.items():
        positions = data.order.step(*divmod(step - 1, data.order.steps_per_epoch))
        expected = [data.source.key(int(position)) for position in data.train[positions.ravel()]]
        assert sorted(keys) == sorted(expected), f"step {step}"
