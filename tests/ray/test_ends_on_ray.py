"""How runs on Ray end: what no retry cures, a hang, a killed driver, a stop before there are workers; and gauges."""

from __future__ import annotations

import re
import signal
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from processes import FP64, SMALL, curve, read_json, relative, rows, started, wait_for

pytestmark = pytest.mark.slow

LONG = ["epochs=400", "measure_every=4000", "save_every=20"]


def step_of(out: Path) -> int:
    return int(last[0]["step"]) if (last := rows(out)[-1:]) else -1


def notices(out: Path) -> str:
    return (out / "notices.txt").read_text() if (out / "notices.txt").exists() else ""


def trainers(head: Any) -> list[psutil.Process]:
    return [process for process in head.workers("ray::") if "RayTrainWorker" in " ".join(process.cmdline())]


def test_what_no_retry_cures_ends_the_group_at_once_with_its_own_message(ray_head: Any, tmp_path: Path) -> None:
    """A file of the data set is gone, which the check at the start could not foresee."""
    random = np.random.default_rng(0)
    for position in range(120):
        path = tmp_path / f"images/{position % 3}/{position:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    out, log = tmp_path / "run", tmp_path / "log"
    settings = [f"out={out}", f"data.train={tmp_path / 'images'}", *LONG]
    with started(log, "pretrain", SMALL, *settings, env=ray_head.env) as driver:
        wait_for(lambda: step_of(out) >= 5, 120, "5 steps", driver)
        for path in (tmp_path / "images/0").iterdir():
            path.unlink()
        assert driver.wait(60) == 2, log.read_text()[-4000:]
    said, status = log.read_text(), read_json(out / "status.json")
    assert re.search(r"^error: .*/images/0/\d+\.png", said, re.MULTILINE), said[-4000:]
    assert (status["state"], status["code"]) == ("bad_input", 2) and "/images/0/" in status["reason"]
    assert notices(out).count("workers") == 0 and "starts again" not in said


def test_a_stopped_worker_is_named_on_the_driver_s_console_and_the_group_starts_again(
    ray_head: Any, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    command = ["pretrain", SMALL, f"out={out}", *LONG, "launch.hang_s=10"]
    with started(log, *command, env=ray_head.env) as driver:
        wait_for(lambda: step_of(out) >= 30, 120, "30 steps", driver)
        stopped = trainers(ray_head)
        assert len(stopped) == 2
        stopped[0].suspend()
        wait_for(lambda: "starts again" in notices(out), 90, "the watchdog", driver)
        before = step_of(out)
        wait_for(lambda: step_of(out) >= before + 10, 120, "steps of the next group", driver)
        assert not stopped[0].is_running() or stopped[0].status() == psutil.STATUS_ZOMBIE
        driver.send_signal(signal.SIGUSR1)
        assert driver.wait(60) == 75, log.read_text()[-4000:]
    said = log.read_text()
    assert re.search(r"hang: rank [01] gives no sign of life, .* step \d+, (gradients|update)", said), said[-4000:]
    assert read_json(out / "status.json")["state"] == "preempted"
    assert list(curve(out)) == list(range(1, step_of(out) + 1))


def test_kill_9_of_the_driver_and_the_same_command_at_once_with_a_surplus_worker(
    ray_head: Any, one_process: dict[str, Path], tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    command = ["pretrain", SMALL, f"out={out}", *FP64["ce"], "--on", "ray"]
    elastic = ["launch.workers={min: 1, max: 4}", "launch.cpus=0.625"]  # three fit, and cannot share 4 micro-batches
    with started(log, *command, *elastic, env=ray_head.env) as driver:
        wait_for(lambda: step_of(out) >= 11, 120, "11 steps", driver)
        driver.kill()
        driver.wait()
    with started(log, *command, env=ray_head.env) as driver:
        assert driver.wait(180) == 0, log.read_text()[-4000:]
    assert "3 workers started, 2 train, 1 idle: 2 is the largest of [1, 2, 4]" in log.read_text()
    found, expected = curve(out), curve(one_process["ce"])
    assert list(found) == list(expected)
    assert max(relative(found[step], expected[step]) for step in found) < 1e-9


def test_a_run_shows_gauges_and_keeps_a_second_start_waiting_and_ends_by_ctrl_c(ray_head: Any, tmp_path: Path) -> None:
    out, log, second = tmp_path / "gauged", tmp_path / "log", tmp_path / "second"
    command = ["pretrain", SMALL, f"out={out}", *LONG, "launch.workers=1"]
    with started(log, *command, env=ray_head.env) as driver:
        wait_for(lambda: step_of(out) >= 5, 120, "5 steps", driver)
        with started(second, *command, "--on", "here") as other:
            metrics = scraped_until(ray_head, 'run="gauged"')
            wait_for(lambda: "waiting up to 60 s" in second.read_text(), 60, "the second one waits", other)
        assert read_json(out / "status.json")["state"] == "running"
        step = step_of(out)
        wait_for(lambda: step_of(out) > step, 60, "the first one goes on", driver)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(60) == 130, log.read_text()[-4000:]
    assert read_json(out / "status.json")["state"] == "interrupted"
    values = {float(value) for value in re.findall(r'^ray_nc_dist_train_loss\{.*run="gauged".*\} (\S+)', metrics, re.M)}
    assert len(values) == 1 and values <= set(curve(out).values())
    (steps,) = (float(value) for value in re.findall(r'^ray_nc_dist_step\{.*run="gauged".*\} (\S+)', metrics, re.M))
    assert 1 <= steps <= step_of(out)


def scraped_until(head: Any, word: str) -> str:
    """The gauges that the head's metrics port exports, as soon as the word is in them; they lag by seconds."""
    (port,) = (word.partition("=")[2] for word in head.process.args if str(word).startswith("--metrics-export-port="))
    found = [""]

    def look() -> bool:
        with suppress(OSError):
            found[0] = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        return word in found[0]

    wait_for(look, 90, f"{word} at the metrics port")
    return found[0]


def test_a_stop_before_there_are_workers_ends_the_driver_at_once(ray_head: Any, tmp_path: Path) -> None:
    """The cluster has two CPUs, and might grow: the driver waits."""
    out, log = tmp_path / "run", tmp_path / "log"
    command = ["pretrain", SMALL, f"out={out}", "launch.workers=4"]
    with started(log, *command, env=ray_head.env) as driver:
        wait_for(lambda: (out / "ray").is_dir() and list((out / "ray").iterdir()), 90, "Ray Train", driver)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(30) == 75, log.read_text()[-4000:]
    assert "nothing was to be saved" in log.read_text()
    assert read_json(out / "status.json")["state"] == "preempted"
