"""Fetching: whatever servers do, a file in the cache has the bytes that were asked for, or an error has the URL."""

import hashlib
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import numpy as np
import psutil
import pytest

from nc_dist.data.shards import fetch as fetching
from nc_dist.data.shards.cache import Cache, NoRoom, touch
from nc_dist.data.shards.fetch import fetch
from nc_dist.data.shards.urls import Retry, Stopped, open_stream
from nc_dist.errors import InputError
from servers import Fault, Remote

QUICK = Retry(timeout=0.4, attempts=4)
DATA = np.random.default_rng(0).bytes(300_000)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", retry=QUICK)


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [Fault(status=503), Fault(status=429)],
        [Fault(status=500), Fault(cut=0), Fault(status=502)],
        [Fault(cut=1)],
        [Fault(cut=100_000), Fault(cut=100_000)],
        [Fault(cut=299_999), Fault(status=503)],
        [Fault(wrong=True)],
        [Fault(wrong=True, cut=200_000)],
        [Fault(stall=0)],
        [Fault(stall=150_000)],
        [Fault(cut=100_000, no_length=True)],
        [Fault(cut=100_000), Fault(no_range=True)],
    ],
    ids=str,
)
def test_faults_that_pass_leave_no_trace(remote: Remote, cache: Cache, faults: list[Fault]) -> None:
    remote.put("a/0.tar", DATA)
    remote.server.faults = {"0.tar": iter(faults)}
    path = fetch(f"{remote.url}/a/0.tar", sha256(DATA), len(DATA), cache)
    assert path.read_bytes() == DATA
    assert next(remote.server.faults["0.tar"], None) is None, "every fault was met"
    assert [p.suffix for p in cache.folder.rglob("*.partial")] == []


@pytest.mark.parametrize(
    "fault, found",
    [
        (Fault(status=503), "given up after 4 attempts"),
        (Fault(cut=0), "given up after 4 attempts"),
        (Fault(stall=0), "given up after 4 attempts"),
        (Fault(wrong=True), "not the file of the manifest: sha256 .* expected, found sha256"),
    ],
    ids=str,
)
def test_faults_that_last_are_an_error_with_the_url(remote: Remote, cache: Cache, fault: Fault, found: str) -> None:
    remote.put("0.tar", DATA)
    remote.server.faults = {"0.tar": repeat(fault)}
    with pytest.raises(InputError, match=f"^{remote.url}/0.tar: {found}"):
        fetch(f"{remote.url}/0.tar", sha256(DATA), len(DATA), cache)
    assert len(remote.server.gets("0.tar")) <= 4
    assert not cache.path(sha256(DATA)).exists()


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_will_never_work_is_told_at_once(http: Remote, cache: Cache, status: int) -> None:
    http.put("0.tar", DATA)
    http.server.faults = {"0.tar": repeat(Fault(status=status))}
    with pytest.raises(InputError, match=f"{http.url}/0.tar: {status} "):
        fetch(f"{http.url}/0.tar", sha256(DATA), len(DATA), cache)
    assert len(http.server.gets("0.tar")) == 1


@pytest.mark.parametrize("url", ["s3://shards/none.tar", "s3://no-such-bucket/0.tar"])
def test_a_file_or_bucket_that_is_not_there_is_told_at_once(s3: Remote, cache: Cache, url: str) -> None:
    with pytest.raises(InputError, match=f"{url}: no such file"):
        fetch(url, sha256(DATA), len(DATA), cache)
    assert sum(method == "HEAD" for method, _, _ in s3.server.requests) == 1


def test_a_bucket_without_access_is_told_at_once(s3: Remote, cache: Cache) -> None:
    s3.put("0.tar", DATA)
    s3.server.faults = {"0.tar": repeat(Fault(status=403))}
    with pytest.raises(InputError, match=r"s3://shards/0.tar: no access"):
        fetch("s3://shards/0.tar", sha256(DATA), len(DATA), cache)


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"x", b"<html>moved</html>", b""], ids=len)
def test_a_file_of_another_size_is_refused(remote: Remote, cache: Cache, data: bytes) -> None:
    remote.put("0.tar", data)
    with pytest.raises(InputError, match=rf"300000 bytes expected, found {len(data)} bytes at the server"):
        fetch(f"{remote.url}/0.tar", sha256(DATA), len(DATA), cache)


def test_only_missing_bytes_are_asked_for_again(http: Remote, cache: Cache) -> None:
    http.put("0.tar", DATA)
    http.server.faults = {"0.tar": iter([Fault(cut=100_000), Fault(stall=50_000)])}
    fetch(f"{http.url}/0.tar", sha256(DATA), len(DATA), cache)
    assert http.server.gets("0.tar") == [None, "bytes=100000-", "bytes=150000-"]


def test_a_server_without_ranges_is_read_again_from_its_beginning(http: Remote, cache: Cache) -> None:
    http.put("0.tar", DATA)
    http.server.faults = {"0.tar": iter([Fault(cut=100_000), Fault(no_range=True)])}
    fetch(f"{http.url}/0.tar", sha256(DATA), len(DATA), cache)
    assert http.server.gets("0.tar") == [None, "bytes=100000-"]


def test_connections_that_are_always_cut_bring_the_file_in_the_end(remote: Remote, cache: Cache) -> None:
    remote.put("0.tar", DATA)
    remote.server.faults = {"0.tar": repeat(Fault(cut=100_000))}
    patient = replace(cache, retry=Retry(timeout=0.4, attempts=10))
    assert fetch(f"{remote.url}/0.tar", sha256(DATA), len(DATA), patient).read_bytes() == DATA


def test_a_later_run_goes_on_where_one_gave_up(remote: Remote, cache: Cache) -> None:
    data = DATA * 20
    remote.put("0.tar", data)
    first = Fault() if remote.url.startswith("s3") else Fault(cut=5_000_000)  # of S3, pieces of 4 MiB are asked for
    remote.server.faults = {"0.tar": iter([first, *[Fault(status=503)] * 4])}
    with pytest.raises(InputError, match="given up"):
        fetch(f"{remote.url}/0.tar", sha256(data), len(data), cache)
    kept = cache.partial(sha256(data), len(data)).stat().st_size
    assert kept > 4_000_000
    remote.server.requests.clear()
    assert fetch(f"{remote.url}/0.tar", sha256(data), len(data), cache).read_bytes() == data
    starts = [
        int((asked or "bytes=0-").removeprefix("bytes=").partition("-")[0]) for asked in remote.server.gets(".tar")
    ]
    assert min(starts) == kept


def test_wrong_bytes_are_fetched_again_and_told(http: Remote, cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    http.put("0.tar", DATA)
    http.server.faults = {"0.tar": iter([Fault(wrong=True)])}
    assert fetch(f"{http.url}/0.tar", sha256(DATA), len(DATA), cache).read_bytes() == DATA
    (told,) = caplog.messages
    assert told.startswith(f"{http.url}/0.tar: wrong bytes, sha256 ") and told.endswith("; attempt 2 of 3 follows")


def test_a_partial_file_with_wrong_bytes_is_thrown_away(http: Remote, cache: Cache) -> None:
    http.put("0.tar", DATA)
    partial = cache.partial(sha256(DATA), len(DATA))
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * 1000)
    assert fetch(f"{http.url}/0.tar", sha256(DATA), len(DATA), cache).read_bytes() == DATA
    assert http.server.gets("0.tar") == ["bytes=1000-", None]


def test_files_with_one_base_name_never_collide(remote: Remote, cache: Cache) -> None:
    for name in ("train", "val"):
        remote.put(f"{name}/000.tar", name.encode())
    for name in ("train", "val", "train", "val"):
        data = name.encode()
        assert fetch(f"{remote.url}/{name}/000.tar", sha256(data), len(data), cache).read_bytes() == data
    assert len(remote.server.gets("000.tar")) == 2


def test_a_cached_file_of_the_wrong_size_is_fetched_again(http: Remote, cache: Cache) -> None:
    http.put("0.tar", DATA)
    arguments = (f"{http.url}/0.tar", sha256(DATA), len(DATA), cache)
    fetch(*arguments).write_bytes(DATA[:-1])
    assert fetch(*arguments).read_bytes() == DATA
    assert len(http.server.gets("0.tar")) == 2


def test_a_damaged_cached_file_is_fetched_again_when_its_hash_is_looked_at(http: Remote, cache: Cache) -> None:
    http.put("0.tar", DATA)
    arguments = (f"{http.url}/0.tar", sha256(DATA), len(DATA), cache)
    fetch(*arguments).write_bytes(DATA[::-1])
    assert fetch(*arguments, rehash=True).read_bytes() == DATA
    assert fetch(*arguments, rehash=True).read_bytes() == DATA
    assert len(http.server.gets("0.tar")) == 2


@pytest.mark.parametrize("sha", ["../../../etc/passwd", "", "A" * 64, "0" * 63])
def test_a_hash_that_is_none_is_refused(cache: Cache, sha: str) -> None:
    with pytest.raises(InputError, match="not a sha256"):
        fetch("http://127.0.0.1:9/0.tar", sha, 1, cache)


def test_a_url_without_handler_is_named_with_what_to_install(cache: Cache) -> None:
    for url, remedy in [
        ("abc://x/0.tar", r"nothing here opens abc://"),
        ("gs://x/0.tar", r"gs:// needs a package .* pip install 'nc-dist\[gcs\]'"),
        ("http://[x/0.tar", "not a URL"),
    ]:
        if url.startswith("gs") and _installed("gcsfs"):
            continue
        with pytest.raises(InputError, match=remedy) as caught:
            fetch(url, sha256(DATA), len(DATA), cache)
        assert str(caught.value).startswith(url)


def _installed(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def test_other_file_systems_of_fsspec_are_read(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "0.tar").write_bytes(DATA)
    assert fetch(f"file://{tmp_path}/0.tar", sha256(DATA), len(DATA), cache).read_bytes() == DATA
    with pytest.raises(InputError, match="none.tar: no such file"):
        fetch(f"file://{tmp_path}/none.tar", sha256(DATA), 1, replace(cache, folder=tmp_path / "other"))


def test_a_file_system_that_never_answers_is_given_up(tmp_path: Path, cache: Cache) -> None:
    os.mkfifo(tmp_path / "0.tar")  # to open it takes a writer
    began = time.monotonic()
    with pytest.raises(InputError, match="0.tar: given up after 4 attempts; the last one: no answer within 0.4 s"):
        fetch(f"file://{tmp_path}/0.tar", sha256(DATA), len(DATA), cache)
    assert time.monotonic() - began < 3
    os.close(os.open(tmp_path / "0.tar", os.O_WRONLY))


def test_the_output_of_a_command_is_a_file(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "0.tar").write_bytes(DATA)
    assert fetch(f"pipe:cat {tmp_path}/0.tar | cat", sha256(DATA), len(DATA), cache).read_bytes() == DATA


@pytest.mark.parametrize(
    "then, reason", [("exit 3", "exit status 3"), ("sleep 77.PID | cat", "no byte within 0.4 s")]
)
def test_a_command_that_fails_or_stalls_is_ended_and_named(cache: Cache, then: str, reason: str) -> None:
    with pytest.raises(InputError, match=rf"^pipe:head .*: given up after 4 attempts; the last one: {reason}"):
        fetch(f"pipe:head -c 1000 /dev/zero; {then.replace('PID', str(os.getpid()))}", sha256(DATA), len(DATA), cache)
    commands = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert ["sleep", f"77.{os.getpid()}"] not in commands


def test_a_command_without_end_is_cut_off(cache: Cache) -> None:
    with pytest.raises(InputError, match=r"pipe:yes: not the file of the manifest: .* found more than 300000 bytes"):
        fetch("pipe:yes", sha256(DATA), len(DATA), cache)
    assert not list(cache.folder.rglob("*.partial"))


def test_a_command_that_does_not_exist_is_told_at_once(cache: Cache) -> None:
    with pytest.raises(InputError, match="no such command"):
        fetch("pipe:no_such_command_here 2>/dev/null", sha256(DATA), len(DATA), cache)


def test_a_stream_to_be_read_once_outlives_its_connections(remote: Remote) -> None:
    remote.put("0.tar", DATA)
    remote.server.faults = {"0.tar": iter([Fault(status=503), Fault(cut=100_000), Fault(stall=1000)])}
    with open_stream(f"{remote.url}/0.tar", QUICK) as stream:
        assert stream.read(512) + stream.read(200_000) + stream.read() == DATA


def test_a_full_disk_is_told_with_the_remedy_and_its_bytes_are_used_later(http: Remote, cache: Cache) -> None:
    http.put("0.tar", DATA)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot keep http.*0.tar \(File too large\); free some, set NC_"):
            fetch(f"{http.url}/0.tar", sha256(DATA), len(DATA), cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fetch(f"{http.url}/0.tar", sha256(DATA), len(DATA), cache).read_bytes() == DATA
    assert http.server.gets("0.tar")[1] == "bytes=200000-"


def test_a_cache_that_cannot_be_written_to_is_told(http: Remote, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/cache: cannot keep .*0.tar \(Not a directory\); set NC_DIST_CACHE"):
        fetch(f"{http.url}/0.tar", sha256(DATA), len(DATA), Cache(tmp_path / "file/cache"))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("NC_DIST_CACHE", raising=False)
    assert Cache().folder == tmp_path / ".cache/nc_dist"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert Cache().folder == Path("/somewhere/nc_dist")
    monkeypatch.setenv("NC_DIST_CACHE", "/own")
    assert Cache().folder == Path("/own")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_patience_is_set_by_the_environment(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("NC_DIST_FETCH_TIMEOUT", "2.5")
    monkeypatch.setenv("NC_DIST_FETCH_ATTEMPTS", "3")
    assert Cache().retry == Retry(timeout=2.5, attempts=3)
    monkeypatch.setenv("NC_DIST_FETCH_TIMEOUT", text)
    with pytest.raises(InputError, match=f"NC_DIST_FETCH_TIMEOUT={text}: must be a number above 0"):
        Cache()


# --- the budget ------------------------------------------------------------------------------------------------------


def files(count: int) -> list[bytes]:
    return [bytes([i]) * 1000 for i in range(count)]


def held(cache: Cache) -> set[int]:
    return {path.read_bytes()[0] for path in cache.folder.glob("??/*") if len(path.name) == 64}


@pytest.fixture
def small(http: Remote, cache: Cache) -> tuple[Callable[..., Path], Cache]:
    """A cache with room for three files of a thousand bytes, and what fetches file i."""
    for i, data in enumerate(files(8)):
        http.put(f"{i}.tar", data)
    three = replace(cache, budget=3500)

    def get(i: int, **more: Event) -> Path:
        return fetch(f"{http.url}/{i}.tar", sha256(files(8)[i]), 1000, three, **more)

    return get, three


def test_the_longest_unused_file_goes_first(small: tuple[Callable[..., Path], Cache]) -> None:
    get, cache = small
    for i in (0, 1, 2, 0, 3):
        get(i)
    assert held(cache) == {0, 2, 3}
    touch(cache.path(sha256(files(8)[2])))
    get(4), get(5)
    assert held(cache) == {2, 4, 5}


def test_a_file_larger_than_the_budget_is_refused(http: Remote, cache: Cache) -> None:
    with pytest.raises(InputError, match=r"data.shard_cache_gb=2.5e-07: smaller than the largest shard of 0.0003 GB"):
        fetch(f"{http.url}/0.tar", sha256(DATA), len(DATA), replace(cache, budget=250))


def test_working_ahead_never_removes_files_in_use(small: tuple[Callable[..., Path], Cache]) -> None:
    get, cache = small
    for i in range(3):
        get(i)
    with pytest.raises(NoRoom):
        get(3, stop=Event())
    assert held(cache) == {0, 1, 2}
    os.utime(cache.path(sha256(files(8)[1])), (0, 0))
    get(3, stop=Event())
    assert held(cache) == {0, 2, 3}


def test_a_partial_file_counts_with_the_size_it_will_have(http: Remote, cache: Cache) -> None:
    http.put("0.tar", DATA)
    http.put("1.tar", DATA[::-1])
    http.server.faults = {"0.tar": iter([Fault(stall=1000, slow=0.1)])}
    tight = replace(cache, budget=400_000)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(fetch, f"{http.url}/0.tar", sha256(DATA), len(DATA), tight)
        while not http.server.gets("0.tar"):
            time.sleep(0.01)
        fetch(f"{http.url}/1.tar", sha256(DATA[::-1]), len(DATA), tight)  # waits for the other, which then has to go
        assert first.result() == cache.path(sha256(DATA))
    assert {path.name for path in cache.folder.glob("??/*") if len(path.name) == 64} == {sha256(DATA[::-1])}


def test_an_abandoned_partial_file_makes_room(small: tuple[Callable[..., Path], Cache]) -> None:
    get, cache = small
    abandoned = cache.partial("0" * 64, 3000)
    abandoned.parent.mkdir(parents=True)
    abandoned.write_bytes(b"x")
    get(0)
    assert not abandoned.exists()


def test_two_that_wait_for_room_do_not_wait_for_each_others_leftovers(
    http: Remote, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, make_room = Barrier(2), fetching.make_room

    def once_both_are_there(*args: Any, **more: Any) -> None:
        both.wait(10)  # each holds the lock of its own file by now
        make_room(*args, **more)

    monkeypatch.setattr(fetching, "make_room", once_both_are_there)
    tight = replace(cache, budget=1500)
    threads = []
    for name in (b"a", b"b"):
        data = name * 1000
        http.put(name.decode(), data)
        partial = cache.partial(sha256(data), 1000)
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data[:500])
        asked = (f"{http.url}/{name.decode()}", sha256(data), 1000, tight)
        threads.append(Thread(target=fetch, args=asked, daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_a_download_stops_when_asked_to(http: Remote, cache: Cache) -> None:
    http.put("0.tar", DATA)
    http.server.faults = {"0.tar": repeat(Fault(status=503))}
    stop = Event()
    stop.set()
    with pytest.raises(Stopped):
        fetch(f"{http.url}/0.tar", sha256(DATA), len(DATA), cache, stop=stop)
    assert len(http.server.gets("0.tar")) == 1
