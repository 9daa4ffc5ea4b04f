"""Tests of tools/dev.py that install nothing, and of the two files it works with: the pins and .ci/run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def load_dev() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dev", ROOT / "tools/dev.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


dev = load_dev()


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A folder that looks like a completed venv of this Python, made for the project as it is."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(sys.executable)
    (folder / "pyvenv.cfg").write_text("version = {}.{}.{}\n".format(*sys.version_info))
    inputs = [(ROOT / name).read_bytes() for name in ("pyproject.toml", dev.CONSTRAINTS)]
    python = "{}.{}".format(*sys.version_info)
    (folder / "nc_dist.stamp").write_text(dev.stamp(*inputs, python, str(ROOT)) + "\n")
    return folder


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Records the commands in place of running them; all succeed."""
    seen: list[list[str]] = []
    monkeypatch.setattr(dev, "run", lambda command, *_: seen.append(list(command)) or 0)
    return seen


def test_stamp_changes_with_each_input() -> None:
    inputs = {"pyproject": b"a", "constraints": b"b", "python": "3.11", "root": "/r", "extras": "test"}
    changes = {"pyproject": b"ab", "constraints": b"", "python": "3.12", "root": "/s", "extras": "docs"}
    stamps = {dev.stamp(**inputs), *(dev.stamp(**{**inputs, key: new}) for key, new in changes.items())}
    assert len(stamps) == 1 + len(changes)
    assert dev.stamp(**inputs) == dev.stamp(**inputs)


def test_stamp_keeps_its_inputs_apart() -> None:
    assert dev.stamp(b"ab", b"c", "3.11", "/r") != dev.stamp(b"a", b"bc", "3.11", "/r")


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_supported_python_is_accepted(version: tuple[int, int]) -> None:
    dev.refuse_python(version)


@pytest.mark.parametrize("version", [(2, 7), (3, 10), (3, 14)])
def test_other_python_is_refused(version: tuple[int, int]) -> None:
    with pytest.raises(dev.Refused, match="Remedy"):
        dev.refuse_python(version)


def test_refused_range_is_that_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14"


def test_refusal_exits_with_2_and_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(dev.importlib.util, "find_spec", lambda name: None)
    assert dev.main(["test", "--venv", str(tmp_path / "new")]) == 2
    assert "apt install python3-venv" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_full_disk_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(dev.shutil, "disk_usage", lambda _: usage._replace(free=8 * 10**9))
    with pytest.raises(dev.Refused, match=r"8\.0 GB free(?s:.*)Remedy"):
        dev.refuse_full_disk(tmp_path)


def test_failing_command_shows_its_last_lines_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = "print(*range(100, 130), sep='\\n'); raise SystemExit('No space left on device')"
    code = dev.run([sys.executable, "-c", script], dict(os.environ), tmp_path / "install.log")
    shown = capsys.readouterr().out.splitlines()
    assert code == 1
    assert shown[0].startswith("$ ")
    expected = [*range(111, 130), "No space left on device"]
    assert shown[-dev.TAIL_LINES - 1 : -1] == [f"  {line}" for line in expected]
    assert shown[-1].startswith("Remedy: free disk space")


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("Retrying after connection broken by NewConnectionError\nNo matching distribution found", "network"),
        ("Package 'x' requires a different Python: 3.10.1 not in '>=3.11'", "another Python"),
        ("ERROR: ResolutionImpossible", "tools/constraints.txt"),
        ("something else", "see the log"),
    ],
)
def test_remedy_follows_from_the_output(output: str, advice: str) -> None:
    assert advice in dev.remedy(output)


def test_long_command_shows_signs_of_life(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(dev, "HEARTBEAT_S", 0.3)
    script = "import time; print('Collecting torch', flush=True); time.sleep(1.5)"
    assert dev.run([sys.executable, "-c", script], dict(os.environ), tmp_path / "log") == 0
    assert " s: Collecting torch" in capsys.readouterr().out


def test_signal_is_reported_as_a_shell_does() -> None:
    assert dev.run(["bash", "-c", "kill -TERM $$"], dict(os.environ)) == 128 + 15


def test_ctrl_c_reaches_the_child_and_returns_130(venv: Path) -> None:
    """The child stops in its own time: its last word must be there."""
    (venv / "bin/python").unlink()
    child = "#!/bin/bash\ntrap 'sleep 0.5; echo stopped; exit 5' INT\necho ready\nsleep 60 & wait\n"
    (venv / "bin/python").write_text(child)
    (venv / "bin/python").chmod(0o755)
    command = [sys.executable, str(ROOT / "tools/dev.py"), "test", "--venv", str(venv)]
    # As a terminal does: a group of its own, in which Ctrl-C reaches everybody.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    for line in process.stdout:
        if line == "ready\n":
            break
    os.killpg(process.pid, 2)
    assert process.stdout.read() == "stopped\n"
    assert process.wait() == 130


def test_current_venv_is_used_as_it_is(venv: Path, commands: list[list[str]]) -> None:
    assert dev.main(["test", "--venv", str(venv), "--", "-k", "loss"]) == 0
    (command,) = commands
    assert command[:3] == [str(venv / "bin/python"), "-m", "pytest"]
    assert command[-2:] == ["-k", "loss"]


def test_changed_venv_is_installed_again_then_stamped(venv: Path, commands: list[list[str]]) -> None:
    before = (venv / "nc_dist.stamp").read_text()
    (venv / "nc_dist.stamp").write_text("older\n")
    assert dev.ensure_venv(venv) == 0
    (install,) = commands
    assert install[1:] == ["-m", "pip", "install", "-c", "tools/constraints.txt", "-e", ".[test]"]
    assert (venv / "nc_dist.stamp").read_text() == before


def test_failed_install_leaves_no_stamp(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (venv / "nc_dist.stamp").write_text("older\n")
    monkeypatch.setattr(dev, "run", lambda *_: 7)
    assert dev.main(["demo", "--venv", str(venv)]) == 7
    assert not (venv / "nc_dist.stamp").exists()


def test_venv_of_another_python_is_moved_aside(venv: Path, commands: list[list[str]]) -> None:
    (venv / "pyvenv.cfg").write_text("version = 3.1.4\n")
    assert dev.make_venv(venv, "3.11") == 0
    (aside,) = venv.parent.glob("venv.old-*")
    assert (aside / "pyvenv.cfg").exists() and not venv.exists()
    assert commands == [[sys.executable, "-m", "venv", str(venv)]]


def test_folder_that_is_no_venv_is_left_alone(tmp_path: Path, commands: list[list[str]]) -> None:
    (tmp_path / "thesis.tex").touch()
    assert dev.main(["check", "--venv", str(tmp_path)]) == 2
    assert not commands and [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_offline_never_installs(venv: Path, commands: list[list[str]], tmp_path: Path) -> None:
    (venv / "nc_dist.stamp").write_text("older\n")
    assert dev.ensure_venv(venv, offline=True) == 0
    with pytest.raises(dev.Refused, match="without --offline"):
        dev.ensure_venv(tmp_path / "new", offline=True)
    assert not commands


def test_check_runs_everything_and_fails_if_one_did(
    venv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dev, "run", lambda command, _: 3 if "--check" in command else 0)
    assert dev.main(["check", "--venv", str(venv)]) == 1
    summary = capsys.readouterr().out.split("Summary:\n")[1].splitlines()
    assert [line.split()[0] for line in summary] == ["FAILED", "ok", "ok", "ok"]


def test_constraints_are_sorted_exact_pins_only() -> None:
    lines = (ROOT / dev.CONSTRAINTS).read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)] == []
    names = [line.split("==")[0].lower() for line in lines]
    assert names == sorted(set(names))
    assert not {"pip", "setuptools", "wheel", "nc-dist", "nc_dist"} & set(names)


def test_every_direct_dependency_is_pinned_inside_its_range() -> None:
    pins = dict(line.split("==") for line in (ROOT / dev.CONSTRAINTS).read_text().splitlines())
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]
    for need in wanted:
        if need.name != project["name"]:
            assert need.specifier.contains(pins[canonicalize_name(need.name)]), need


def test_ci_script_passes_shellcheck() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(ROOT / ".ci/run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
