"""Processes that splitrun starts take nothing from the folder that the user stands in."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import pytest

from splitrun.bench.contest import other_process
from splitrun.child import PACKAGE_HOME, child_command, child_environment, safe_spawning


@pytest.fixture
def hostile_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with modules that leave a mark when anyone imports them."""
    for name in ("http", "json", "socket", "pickle", "splitrun"):
        (tmp_path / f"{name}.py").write_text(f"open('taken', 'w').close(); raise SystemExit('{name}.py was imported')")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", [None, "", f"{os.pathsep}other{os.pathsep}"])
@pytest.mark.parametrize(
    "module", ["splitrun.serve.http_process", "splitrun.bench.contestant", "splitrun.engine.stage_process"]
)
def test_children_import_nothing_from_the_current_folder(
    module: str, path: str | None, hostile_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", path)
    command = child_command(module)
    # What is imported is enough; running it would take an engine.
    look = f"import runpy, json, http, {module}; print({module}.__file__)"
    command[command.index("-m") :] = ["-c", look]
    found = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    assert found.stdout.startswith(str(PACKAGE_HOME)), found.stderr
    assert not (hostile_folder / "taken").exists()


def test_an_http_process_starts_in_a_hostile_folder(hostile_folder: Path) -> None:
    outcome = subprocess.run(
        child_command("splitrun.serve.http_process"), env=child_environment(), input="",
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "was imported" not in outcome.stderr
    assert not (hostile_folder / "taken").exists()


def test_an_interrupt_ends_the_process_that_plans_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    with other_process() as process:
        number = process.submit(os.getpid).result()
        planning = process.submit(time.sleep, 60)
        os.kill(number, signal.SIGINT)
        with pytest.raises(BrokenProcessPool):
            planning.result(timeout=20)
    assert capfd.readouterr().err == ""


def test_spawned_processes_import_nothing_from_the_current_folder(hostile_folder: Path) -> None:
    before = os.environ.get("PYTHONSAFEPATH")
    with safe_spawning(), ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(max, 1, 2).result() == 2
    assert os.environ.get("PYTHONSAFEPATH") == before
    assert not (hostile_folder / "taken").exists()
