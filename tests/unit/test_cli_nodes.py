"""The commands around nodes and stages, where no cluster is needed to see what they do."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import typer

from splitrun.__main__ import main
from splitrun.cli.status import lines

FAULTS: list[tuple[list[str], int, str]] = [
    (["node", "list"], 1, "this machine is no node yet: run 'splitrun node start'"),
    (["node", "check"], 1, "this machine is no node yet"),
    (["node", "stop"], 1, "no node runs on this machine"),
    (["node", "join", "127.0.0.1:7400"], 1, "a token is always required: copy the whole command"),
    (["node", "join", "nowhere", "--token", "0" * 48], 1, "'nowhere' is not HOST:PORT"),
    (["node", "start", "--host", "203.0.113.7"], 1, "--host 203.0.113.7 is no address of this machine"),
    (["node", "start", "--name", "process"], 1, "cannot be a node's name"),
    (["node", "start", "--host", "a" * 64], 1, "cannot be found"),
    (["node", "join", "a" * 64 + ":7400", "--token", "0" * 48], 1, "cannot be found"),
    (["status", "--once", "--url", "http://127.0.0.1:9"], 1, "no splitrun server answers at http://127.0.0.1:9"),
    (["status", "--once", "--url", "file:///etc/passwd"], 2, "is no http address"),
    (["plan", "demo", "--nodes", "--memory", "desk/cpu", "--weights", "fp32"], 2, "names no device of this machine"),
]


@pytest.mark.parametrize(("words", "status", "told"), FAULTS, ids=lambda value: str(value)[:40])
def test_faults_are_one_line(words: list[str], status: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == status
    printed = capsys.readouterr().err.strip()
    assert told in printed
    assert "\n" not in printed


ANSWERS = [
    (b"SSH-2.0-OpenSSH_9.6\r\n", 1, "no splitrun server answers at"),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", 2, "is no splitrun server"),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", 2, "is no splitrun server"),
    (b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n", 2, "answers 401: give its --api-key"),
    (b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n", 2, "answers 404: is it the address of a splitrun server?"),
]


@pytest.mark.parametrize(("answer", "status", "told"), ANSWERS, ids=lambda value: str(value)[:30])
def test_a_server_of_another_kind_is_one_line(
    answer: bytes, status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply() -> None:
        taken, _ = listener.accept()
        with taken:
            taken.recv(4096)
            taken.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=reply)
        thread.start()
        assert main(["status", "--once", "--url", f"http://127.0.0.1:{listener.getsockname()[1]}"]) == status
        thread.join()
    printed = capsys.readouterr().err.strip()
    assert told in printed
    assert "\n" not in printed


def test_a_token_that_is_not_typed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(*arguments: object, **options: object) -> None:
        raise typer.Abort

    monkeypatch.setattr("typer.prompt", closed)
    assert main(["node", "join", "127.0.0.1:7400", "--token", "-"]) == 1
    assert "no token was typed" in capsys.readouterr().err


def test_a_trace_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.json"
    words = ["trace", "demo", "Hello", "-o", str(file), "--max-tokens", "3", "--context", "64", "--weights", "fp32"]
    assert main(words) == 0
    assert "3 tokens in 3 steps over 1 stages" in capsys.readouterr().out
    events = json.loads(file.read_bytes())["traceEvents"]
    assert [event["args"]["tokens"] for event in events if event["ph"] == "X"][1:] == [1, 1]


def test_the_live_table() -> None:
    stage: dict[str, Any] = {
        "device": "desk/cpu", "node": "desk", "units": "layers 0–3", "last_step_ms": 1.5, "mean_step_ms": 2.0,
        "queued": 3, "sent_bytes": 4_000_000, "restarts": 5, "kept_bytes": 7_000_000,
    }  # fmt: skip
    now: dict[str, Any] = {"model": "demo", "healthy": False, "reason": "lost", "running": 1, "waiting": 2, "epoch": 6,
                           "completion_tokens": 30, "stages": [stage]}  # fmt: skip
    shown = lines(now, {"completion_tokens": 10}, 2.0)
    assert shown[0] == "demo: not healthy: lost; 1 running, 2 waiting, 10.0 tok/s; epoch 6"
    assert shown[2].split() == ["0", "desk", "cpu", "layers", "0–3", "1.50", "2.00", "3", "4.00", "7.0", "5"]
