"""One writer at a time in a run's folder: free, held, taken over, lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import child_env, wait_for

from nc_dist.errors import InputError
from nc_dist.launch import lease

HOLD = """
import sys, time
from pathlib import Path
from nc_dist.launch import lease
lease.BEAT_S = 0.1
with lease.held(Path(sys.argv[1]), sys.argv[2]):
    time.sleep(float(sys.argv[3]))
print("released", flush=True)
"""


def holder(out: Path, owner: str, seconds: float) -> subprocess.Popen[str]:
    """A process that holds the lease for some seconds."""
    command = [sys.executable, "-c", HOLD, str(out), owner, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_env())
    wait_for(lambda: lease.is_held(out) and (out / lease.FILE).read_text(), 30, "a lease", process)
    return process


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(lease, "STALE_S", 1.5)
    monkeypatch.setattr(lease, "LOOK_S", 0.05)


def elsewhere(out: Path) -> None:
    """Let the lease say that its holder is on another machine."""
    tree = json.loads((out / lease.FILE).read_text())
    (out / lease.FILE).write_text(json.dumps({**tree, "machine": "another", "host": "node7"}))


def test_a_lease_is_held_while_the_block_runs_and_free_afterwards(tmp_path: Path) -> None:
    lease.free(tmp_path / "not there yet", "a")
    with lease.held(tmp_path, "a"):
        assert lease.is_held(tmp_path)
        assert json.loads((tmp_path / lease.FILE).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_another_start_waits_and_is_refused_while_the_holder_touches_it(tmp_path: Path) -> None:
    said: list[str] = []
    process = holder(tmp_path, "a", 60)
    try:
        elsewhere(tmp_path)
        with pytest.raises(lease.Held, match=r"on node7 writes to it"), lease.held(tmp_path, "b", said.append):
            pass
        assert len(said) == 1 and "waiting up to 2 s" in said[0]
        assert process.poll() is None, "the holder goes on"
    finally:
        process.kill()
        process.wait()


def test_another_start_waits_for_the_holder_s_end(tmp_path: Path) -> None:
    process = holder(tmp_path, "a", 0.7)
    with lease.held(tmp_path, "b"):
        assert process.wait(10) == 0
        assert json.loads((tmp_path / lease.FILE).read_text())["owner"] == "b"


def test_a_dead_process_of_this_machine_holds_nothing(tmp_path: Path) -> None:
    process = holder(tmp_path, "a", 60)
    process.kill()
    process.wait()
    assert not lease.is_held(tmp_path) and (tmp_path / lease.FILE).exists()
    began = time.monotonic()
    with lease.held(tmp_path, "b"):
        assert time.monotonic() - began < 0.5


def test_a_holder_on_another_machine_that_gives_no_sign_is_taken_for_gone(tmp_path: Path) -> None:
    process = holder(tmp_path, "a", 60)
    process.kill()
    process.wait()
    elsewhere(tmp_path)
    began = time.monotonic()
    with lease.held(tmp_path, "b"):
        assert 1.4 < time.monotonic() - began < 5


def test_who_waited_for_a_stale_lease_has_removed_it_so_that_nobody_waits_again(tmp_path: Path) -> None:
    process = holder(tmp_path, "a", 60)
    process.kill()
    process.wait()
    elsewhere(tmp_path)
    lease.free(tmp_path, "b")
    assert list(tmp_path.iterdir()) == []
    said: list[str] = []
    with lease.held(tmp_path, "c", said.append):
        assert said == []


def test_a_restarted_group_takes_its_own_lease_at_once_and_the_old_holder_ends(tmp_path: Path) -> None:
    process = holder(tmp_path, "a", 60)
    began = time.monotonic()
    with lease.held(tmp_path, "a"):
        assert time.monotonic() - began < 0.5
        assert process.wait(10) == 1 and "taken over" in (process.stdout.read() if process.stdout else "")
        assert lease.is_held(tmp_path), "the one that lost does not take the new one away"


def test_a_lease_that_is_made_between_look_and_take_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, look, free = holder(tmp_path, "a", 60), lease.free, [None]
    monkeypatch.setattr(lease, "free", lambda *args: free.pop() if free else look(*args))
    try:
        elsewhere(tmp_path)
        with pytest.raises(InputError), lease.held(tmp_path, "b"):
            pass
        assert free == [] and process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_who_lost_a_lease_leaves_the_new_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 60)
    first, second = lease.held(tmp_path, "a"), lease.held(tmp_path, "a")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert lease.is_held(tmp_path)
    second.__exit__(None, None, None)
    assert not lease.is_held(tmp_path)


def test_of_several_that_start_together_one_gets_it(tmp_path: Path) -> None:
    got: list[str] = []
    ready = threading.Barrier(6)

    def contend(name: str) -> None:
        ready.wait()
        try:
            with lease.held(tmp_path, name, lambda line: None):
                got.append(name)
                time.sleep(2.5)
        except InputError:
            pass

    threads = [threading.Thread(target=contend, args=(f"{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
