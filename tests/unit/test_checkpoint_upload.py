"""Copies behind a URL: committed by the manifest, pruned by the same rule, tried again, and brought back whole."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from nc_dist import checkpoint
from nc_dist.checkpoint import Retention, Uploads, upload
from nc_dist.checkpoint.manifest import MANIFEST, checkpoints_in, step_of
from nc_dist.checkpoint.places import Place
from nc_dist.checkpoint.upload import fetch_newest
from nc_dist.errors import InputError
from nc_dist.world import World


class Engine:
    """Writes two small files."""

    def save(self, folder: Path, client_state: dict[str, Any]) -> list[Path]:
        (folder / "zero").mkdir()
        for name in ("weights", "zero/part"):
            (folder / name).write_text(f"{name} at {client_state}")
        return [folder / "weights", folder / "zero/part"]


def save(folder: Path, step: int, best_step: int | None = None, retention: Retention = Retention()) -> Path:  # noqa: B008
    engine: Any = Engine()
    state = {"step": step, "best_step": best_step}
    return checkpoint.save(folder, engine, step, state, World(), best=best_step, retention=retention)


def uploaded(url: str, folder: Path, steps: dict[int, int | None], retention: Retention) -> dict[str, Any]:
    """Save these steps, {step: the best so far}, and copy them; what the result says."""
    uploads = Uploads(url, folder, retention, World())
    for step, best in steps.items():
        save(folder, step, best, retention)
        uploads.add(step)
    found: dict[str, Any] = uploads.close()["upload"]
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "WAIT_S", 0.001)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The URL of an S3 that is written to as clients do."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket on it."""
    from s3fs import S3FileSystem

    names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**names, "AWS_ENDPOINT_URL": moto}.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # those of another server
    bucket = f"s3://bucket-{uuid4().hex}"
    S3FileSystem().mkdir(bucket)
    return bucket


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/there" if request.param == "file" else f"{request.getfixturevalue('s3')}/runs/x"


def there(url: str) -> list[int]:
    return [step_of(place) for place in checkpoints_in(url)]


def test_what_is_copied_is_whole_kept_by_the_same_rule_and_comes_back_with_its_links(url: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    found = uploaded(url, here, {1: 1, 2: 2, 3: 2, 4: 2, 5: 2}, Retention(2, frozenset({1})))
    assert found == {"url": url, "uploaded": found["uploaded"], "failed": {}}
    assert there(url) == [1, 2, 4, 5] and set(Place(url).names()) == {f"step_{n}" for n in (1, 2, 4, 5)}
    assert [checkpoint.verify(place) for place in checkpoints_in(url)] == [[], [], [], []]

    back = tmp_path / "back"
    assert fetch_newest(checkpoints_in(url), back) == back / "step_5"
    assert ((back / "last").readlink().name, (back / "best").readlink().name) == ("step_5", "step_2")
    assert checkpoint.verify(back / "step_2") == checkpoint.verify(back / "step_5") == []
    assert (back / "step_5/zero/part").read_text() == (here / "step_5/zero/part").read_text()


def test_a_copy_that_never_ended_is_not_looked_at_and_goes(url: str, tmp_path: Path) -> None:
    uploaded(url, tmp_path / "here", {1: None, 2: None}, Retention(2))
    half = Place(url) / "step_3"
    half.put(tmp_path / "here/step_2/weights", "weights")
    assert there(url) == [1, 2] and "step_3" in Place(url).names()
    assert fetch_newest(checkpoints_in(url), tmp_path / "back") == tmp_path / "back/step_2"
    uploaded(url, tmp_path / "here", {4: None}, Retention(2))
    assert set(Place(url).names()) == {"step_2", "step_4"}


def test_a_damaged_copy_is_passed_over_and_only_damaged_ones_are_an_error(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uploaded(url, tmp_path / "here", {1: None, 2: None}, Retention(2))
    (tmp_path / "other").write_text("weights at {'step': 7, 'best_step': None}")
    (Place(url) / "step_2").put(tmp_path / "other", "weights")
    assert fetch_newest(checkpoints_in(url), tmp_path / "back") == tmp_path / "back/step_1"
    assert "step_2 is damaged and passed over" in capsys.readouterr().out
    (Place(url) / "step_1").remove("weights")
    assert fetch_newest(checkpoints_in(url), tmp_path / "again") is None
    assert fetch_newest(checkpoints_in(url), tmp_path / "again", after=2) is None


def test_copies_of_a_future_that_is_run_again_go_and_what_an_interrupted_fetch_left_is_no_part_of_the_next(
    tmp_path: Path,
) -> None:
    url, here, back = f"file://{tmp_path}/there", tmp_path / "here", tmp_path / "back"
    uploaded(url, here, {10: None, 20: None, 30: None}, Retention(2))
    for step in (20, 30):
        shutil.rmtree(here / f"step_{step}")
    uploaded(url, here, {15: None}, Retention(2))
    assert there(url) == [15]

    (back / "step_15.partial").mkdir(parents=True)
    (back / "step_15.partial/stray").write_text("of an earlier fetch")
    assert fetch_newest(checkpoints_in(url), back) == back / "step_15"
    assert sorted(path.name for path in (back / "step_15").iterdir()) == [MANIFEST, "weights", "zero"]


def test_the_manifest_is_written_last_and_a_step_reached_again_is_committed_anew(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: Callable[..., None] = Place.put
    written: list[str] = []

    def noted(self: Place, source: Path, name: str) -> None:
        written.append(name if MANIFEST not in self.names() else f"{name} beside an old manifest")
        put(self, source, name)

    monkeypatch.setattr(Place, "put", noted)
    path = save(tmp_path / "here", 1)
    upload.upload(path, Place(url) / "step_1")
    upload.upload(path, Place(url) / "step_1")  # there already
    assert written == ["weights", "zero/part", MANIFEST]
    save(tmp_path / "here", 1, best_step=1)
    upload.upload(path, Place(url) / "step_1")
    assert written[3:] == ["weights", "zero/part", MANIFEST]


def test_what_an_earlier_attempt_did_not_copy_is_copied_by_the_next_one(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/there"
    save(tmp_path / "here", 1)
    assert Uploads(url, tmp_path / "here", Retention(), World()).close()["upload"]["uploaded"] == [1]
    assert there(url) == [1]


def test_a_server_that_fails_is_tried_again_and_one_that_keeps_failing_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"file://{tmp_path}/there"
    put, failures = Place.put, iter(range(2))

    def flaky(self: Place, source: Path, name: str) -> None:
        if self.folder_name == "step_2" or next(failures, None) is not None:
            raise ConnectionError("reset by peer")
        put(self, source, name)

    monkeypatch.setattr(Place, "put", flaky)
    found = uploaded(place, tmp_path / "here", {1: None, 2: None, 3: None}, Retention(None))
    assert found["uploaded"] == [1, 3] and found["failed"] == {"2": "ConnectionError: reset by peer"}
    said = capsys.readouterr()
    assert "upload of step_1: attempt 2 of 5 failed: reset by peer" in said.out
    assert f"error: upload of step_2 to {place} failed: ConnectionError: reset by peer; it is whole here" in said.err
    assert there(place) == [1, 3]


def test_a_stop_does_not_wait_for_a_slow_store_and_the_next_start_copies_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, put, goes_on = f"file://{tmp_path}/there", Place.put, threading.Event()

    def slow(self: Place, source: Path, name: str) -> None:
        goes_on.wait(20)
        put(self, source, name)

    monkeypatch.setattr(Place, "put", slow)
    save(tmp_path / "here", 1)
    uploads, began = Uploads(url, tmp_path / "here", Retention(), World()), time.monotonic()
    signs: list[float] = []
    monkeypatch.setattr(upload, "STOP_WAIT_S", 0.1)
    monkeypatch.setattr(upload, "POLL_S", 0.05)
    assert uploads.close(lambda: len(signs) > 3, lambda: signs.append(time.monotonic())) is None
    assert len(signs) > 4 and time.monotonic() - began < 10, "it waits on, and says that it is alive, until it is asked"
    assert f"not all checkpoints are copied to {url} yet" in capsys.readouterr().out
    goes_on.set()
    assert uploads.close() is not None
    shutil.rmtree(tmp_path / "there")
    assert Uploads(url, tmp_path / "here", Retention(), World()).close()["upload"]["uploaded"] == [1]


def test_a_best_copy_that_is_damaged_does_not_hold_up_the_newest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/there"
    uploaded(url, tmp_path / "here", {1: 1, 2: 1}, Retention(2))
    (Place(url) / "step_1").remove("weights")
    assert fetch_newest(checkpoints_in(url), tmp_path / "back") == tmp_path / "back/step_2"
    assert "step_1 is damaged and passed over" in capsys.readouterr().out
    assert not (tmp_path / "back/best").exists() and (tmp_path / "back/last").readlink().name == "step_2"


def test_without_a_url_nothing_is_done(tmp_path: Path) -> None:
    uploads = Uploads(None, tmp_path, Retention(), World())
    uploads.add(1)
    assert uploads.close() == {} and uploads.in_use == set()


def test_a_place_that_cannot_be_written_to_is_refused_by_its_key(tmp_path: Path, s3: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="upload=.*file/x: cannot be written to"):
        Place(f"file://{tmp_path}/file/x").check_writable("upload")
    with pytest.raises(InputError, match="nothing here opens nosuch://"):
        Place("nosuch://x")
    Place(f"file://{tmp_path}/new").check_writable("upload")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(InputError, match="upload=s3://nowhere/x: cannot be written to"):
        Place("s3://nowhere/x").check_writable("upload")
    Place(f"{s3}/x").check_writable("upload")
    assert Place(f"{s3}/x").names() == []
