"""The HTTP process's life: loading, deadlines, draining, and no orphan whichever side dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fake_engine import FakeEngine

from splitrun.child import child_command, child_environment
from splitrun.errors import InvalidRequest
from splitrun.serve import guard
from splitrun.serve.launcher import CannotListen, HttpProcessLost, ServeOptions, Server, listen

FAKE = Path(__file__).resolve().parent.parent / "fake_engine.py"
BODY: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 400, "stream": True, "return_token_ids": True}


@pytest.fixture
def empty_model(tmp_path: Path) -> Path:
    """A directory without tokenizer: nothing to import, so the process starts at once."""
    return tmp_path


@contextmanager
def serving(model: Path, engine: FakeEngine, **options: Any) -> Iterator[Server]:
    with Server(ServeOptions(model, "fake", port=0, **options)) as server:
        server.wait_ready()
        server.attach(engine)
        yield server
    engine.close()


def test_a_taken_port_is_one_clear_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=f"127.0.0.1:{port}: .*in use.*--port"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "mends"),
    [
        ("no such host", 0, "--host"),
        ("a" * 64, 0, "--host"),
        ("127.0.0.1", 70_000, "--port"),
        ("192.0.2.1", 0, "--host must be an address of"),
    ],
)
def test_an_impossible_address_is_one_clear_line(host: str, port: int, mends: str) -> None:
    with pytest.raises(CannotListen, match=mends):
        listen(host, port)


def test_while_the_model_loads_the_server_says_so(empty_model: Path) -> None:
    with Server(ServeOptions(empty_model, "fake", port=0)) as server:
        server.wait_ready()
        health = httpx.get(f"{server.url}/health")
        answer = httpx.post(f"{server.url}/v1/completions", json={**BODY, "stream": False})
        assert [health.status_code, answer.status_code] == [503, 503]
        assert "loading" in health.json()["reason"]
        assert "loading" in answer.json()["error"]["message"]
        engine = FakeEngine(context=1000)
        server.attach(engine)
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.warning == ""
        engine.close()


def test_without_a_tokenizer_token_ids_work_and_text_is_refused(empty_model: Path) -> None:
    with serving(empty_model, FakeEngine(context=1000)) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={**BODY, "stream": False, "max_tokens": 3})
        assert len(answer.json()["choices"][0]["token_ids"]) == 3
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "text"})
        assert refused.status_code == 400
        assert "holds no tokenizer" in refused.json()["error"]["message"]


def test_bodies_that_are_no_json_are_refused_clearly(empty_model: Path) -> None:
    table = [
        (b'{"prompt": [5,', "application/json", "the body is not valid JSON"),
        (b'{"prompt": [5]}', "text/plain", "send Content-Type: application/json"),
    ]
    with serving(empty_model, FakeEngine()) as server:
        for body, kind, told in table:
            answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": kind})
            assert answer.status_code == 400
            assert told in answer.json()["error"]["message"]
            assert answer.json()["error"]["param"] is None
        for prompt in ([], [1, "a"], [[]], ["a", [1]]):
            answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": prompt})
            assert answer.json()["error"]["message"].startswith("prompt: a prompt is a text, a list of texts, ")
        chat = {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 0}
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=chat)
        assert refused.json()["error"]["message"] == "max_completion_tokens is 0: it must be at least 1"
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"top_k": -5}, "top_k is -5"),
            ({"logit_bias": {"7": 101}}, "logit_bias of 7 is 101"),
            ({"repetition_penalty": 101}, "between 0.01 and 100"),
        ]
        for fields, told in wrong:
            answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": [5], "max_tokens": 1, **fields})
            assert answer.status_code == 400
            assert told in answer.json()["error"]["message"]
        off = httpx.post(f"{server.url}/v1/completions", json={"prompt": [5], "max_tokens": 1, "top_k": -1})
        assert off.status_code == 200


def test_requests_that_trickle_in_are_cut_off(empty_model: Path) -> None:
    heads = [
        b"GET /health HTT",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 99\r\n\r\n{",
    ]
    with serving(empty_model, FakeEngine(), receive_deadline_s=0.3) as server:
        for head in heads:
            with socket.create_connection((server.host, server.port)) as slow:
                slow.sendall(head)
                slow.settimeout(10)
                answer = b"".join(iter(lambda: slow.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 408")
        assert httpx.get(f"{server.url}/health").status_code == 200


async def read_whole(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers a second after the request has come, whatever that took."""
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(1.0)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.mark.parametrize(("silent_s", "between_s"), [(0.25, 0.2), (0.0, 0.4)])
def test_a_request_that_has_come_is_answered_however_late_it_was(
    silent_s: float, between_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a silence that is none of its time; or within the grace that the guard has to answer."""
    monkeypatch.setattr(guard, "_GRACE_S", 0.3)
    head = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\n"

    async def talk() -> bytes:
        settings = uvicorn.Config(read_whole, http=guard.deadline_protocol(0.3), lifespan="off", log_level="error")
        server = uvicorn.Server(settings)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving_it = asyncio.create_task(server.serve(sockets=[listener]))
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            await asyncio.sleep(silent_s)
            writer.write(head + b"ab")
            await asyncio.sleep(between_s)
            writer.write(b"cd")
            try:
                return await asyncio.wait_for(reader.read(4096), 20)
            finally:
                writer.close()
                server.should_exit = True
                await serving_it

    assert asyncio.run(talk()).startswith(b"HTTP/1.1 200")


def test_a_stopped_server_finishes_its_streams_and_refuses_new_connections(empty_model: Path) -> None:
    engine = FakeEngine(context=1000)
    engine.pause_at(50)
    with serving(empty_model, engine, drain_s=20) as server:
        waiter = threading.Thread(target=server.wait)
        waiter.start()
        with httpx.stream("POST", f"{server.url}/v1/completions", json=BODY, timeout=30) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            server.stop()
            assert engine.wait_for(lambda: refuses(server))
            engine.pause_at(None)
            chunks = [line.removeprefix("data: ") for line in [first, *lines] if line]
        waiter.join(20)
        assert not waiter.is_alive()
    tokens = [token for chunk in chunks[:-1] for token in json.loads(chunk)["choices"][0]["token_ids"]]
    assert (len(tokens), chunks[-1]) == (400, "[DONE]")
    assert engine.cancelled == []


@pytest.mark.parametrize("streams", [True, False])
def test_what_outlasts_the_drain_ends_with_an_error_and_the_process_by_itself(
    streams: bool, empty_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine(context=1000)
    engine.pause_at(5)
    with serving(empty_model, engine, drain_s=1.0) as server:
        waiter = threading.Thread(target=server.wait)
        waiter.start()
        body = {**BODY, "stream": streams}
        answers: list[httpx.Response] = []
        client = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=30))
        )
        client.start()
        assert engine.wait_for(lambda: len(engine.submitted) == 1)
        server.stop()
        client.join(20)
        waiter.join(20)
        # Killed, it would have ended with a signal's status.
        assert server._child.poll() == 0
        assert len(engine.cancelled) == 1
    assert answers[0].status_code == (200 if streams else 503)
    last = [line for line in answers[0].text.splitlines() if line][-1].removeprefix("data: ")
    assert "shutting down" in json.loads(last)["error"]["message"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_does_not_read_leaves_no_traceback(empty_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(context=1_000_000)
    with serving(empty_model, engine, drain_s=1.0) as server:
        waiter = threading.Thread(target=server.wait)
        waiter.start()
        body = json.dumps({**BODY, "max_tokens": 900_000}).encode()
        with socket.create_connection((server.host, server.port)) as deaf:
            head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}"
            deaf.sendall(head.encode() + b"\r\n\r\n" + body)
            assert engine.wait_for(lambda: len(engine.submitted) == 1)
            server.stop()
            waiter.join(60)
            assert server._child.poll() == 0
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("key", ["", "  ", "key ", "a\nb", "schl\u00fcssel", "\udcff"])
def test_a_key_that_nobody_can_send_is_no_key(key: str, empty_model: Path) -> None:
    with pytest.raises(InvalidRequest, match="API key is empty, or has characters"):
        Server(ServeOptions(empty_model, "fake", port=0, api_key=key))


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\udcff"])
def test_a_name_that_nobody_can_ask_for_is_refused(name: str, empty_model: Path) -> None:
    with pytest.raises(InvalidRequest, match="give --served-name"):
        Server(ServeOptions(empty_model, name, port=0))


def refuses(server: Server) -> bool:
    """Whether the HTTP process no longer takes connections. The listening socket itself is this process's too."""
    try:
        httpx.get(f"{server.url}/health", timeout=0.3)
    except httpx.TransportError:
        return True
    return False


def test_a_second_stop_ends_at_once_and_frees_everything(empty_model: Path) -> None:
    engine = FakeEngine(context=1000)
    engine.pause_at(5)
    with serving(empty_model, engine, drain_s=600) as server:
        waiter = threading.Thread(target=server.wait)
        waiter.start()
        with httpx.stream("POST", f"{server.url}/v1/completions", json=BODY, timeout=30) as answer:
            next(answer.iter_lines())
            server.stop()
            server.stop()
            waiter.join(20)
            assert not waiter.is_alive()
            server.close()
            assert len(engine.cancelled) == 1


def test_when_the_http_process_dies_the_server_says_so_and_frees_its_requests(empty_model: Path) -> None:
    engine = FakeEngine(context=1000)
    engine.pause_at(5)
    with serving(empty_model, engine) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=BODY, timeout=30) as answer:
            next(answer.iter_lines())
            os.kill(server.process_id, signal.SIGKILL)
            with pytest.raises(HttpProcessLost, match="ended with status -9"):
                server.wait()
        server.close()
        assert len(engine.cancelled) == 1


@contextmanager
def process(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """A whole server in its own process: itself, its URL, its HTTP process."""
    child = subprocess.Popen(
        [sys.executable, str(FAKE), str(model), *options],
        stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(FAKE.parent.parent)},
    )  # fmt: skip
    try:
        assert child.stdout is not None
        url, http_process = child.stdout.readline().split()
        yield child, url, int(http_process)
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(empty_model: Path, number: signal.Signals) -> None:
    with process(empty_model, "--hold") as (child, url, http_process):
        received: list[str] = []
        body = {**BODY, "stream": False}
        client = threading.Thread(
            target=lambda: received.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30).text)
        )
        client.start()
        while httpx.get(f"{url}/placement").json()["running"] == 0:
            continue
        child.send_signal(number)
        out, _ = child.communicate("go on\n", timeout=30)
        client.join(30)
        assert len(json.loads(received[0])["choices"][0]["token_ids"]) == 400
        assert (out.strip(), child.returncode) == ("ended", 0)
        assert not alive(http_process)


def test_the_http_process_does_not_outlive_its_parent(empty_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, and takes along the folder that its parent could not remove."""
    monkeypatch.setenv("TMPDIR", str(empty_model))
    with process(empty_model) as (child, _, http_process):
        assert list(empty_model.glob("splitrun-*"))
        # Opened first, so that the number cannot mean another process later.
        watched = os.pidfd_open(http_process)
        child.kill()
        child.wait()
        assert ended(watched)
        os.close(watched)
        assert not list(empty_model.glob("splitrun-*"))


def test_an_http_process_whose_parent_ends_while_it_starts_ends_too(tmp_path: Path) -> None:
    """It would hold the port, and wait for the engine of a process that is gone."""
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    address = {"control": f"ipc://{sockets}/control", "events": f"ipc://{sockets}/events", "token": "t"}
    with listen("127.0.0.1", 0) as listener:
        settings = {
            "address": address, "listener": listener.fileno(), "model_path": str(tmp_path), "served_name": "fake",
            "api_key": None, "body_limit_bytes": 1, "receive_deadline_s": 1, "drain_s": 1, "beat_s": 1, "silence_s": 1,
        }  # fmt: skip
        child = subprocess.Popen(
            child_command("splitrun.serve.http_process"), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            pass_fds=[listener.fileno()], env=child_environment(),
        )  # fmt: skip
        _, told = child.communicate(json.dumps(settings) + "\n", timeout=15)
    assert child.returncode == 1
    assert "does not answer" not in told
    assert not sockets.exists()


def ended(watched: int, timeout_s: float = 20.0) -> bool:
    import select

    return bool(select.select([watched], [], [], timeout_s)[0])


def alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True
