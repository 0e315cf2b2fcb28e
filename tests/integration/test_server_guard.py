"""What a server on the loopback does not do: answer other hosts' pages, parse what costs everybody, or fill memory."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import httpx
import psutil
from fake_engine import FakeEngine
from test_server_process import BODY, serving

HOSTS = {
    "localhost": 200,
    "LOCALHOST:8000": 200,
    "my.localhost": 200,
    "127.0.0.1": 200,
    "[::1]:8000": 200,
    "desk.local": 200,
    "evil.example": 403,
    "evil.example:8000": 403,
    "localhost.evil.example": 403,
    "127.0.0.1.evil.example": 403,
}


def test_a_page_whose_name_leads_to_the_loopback_reads_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, FakeEngine(), allowed_hosts=("Desk.local",)) as server:
        found = {host: httpx.get(f"{server.url}/v1/models", headers={"host": host}) for host in HOSTS}
        assert {host: answer.status_code for host, answer in found.items()} == HOSTS
        assert "--allow-host" in found["evil.example"].json()["error"]["message"]


def test_a_page_without_the_key_reads_nothing_under_any_name(tmp_path: Path) -> None:
    with serving(tmp_path, FakeEngine(), api_key="secret") as server:
        headers = {"host": "behind.a.proxy.example"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401
        headers["authorization"] = "Bearer secret"
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200


def test_a_body_of_a_million_lists_is_refused_unparsed(tmp_path: Path) -> None:
    body = b'{"prompt": [' + b"[1]," * 1_000_000 + b"[1]]}"
    with serving(tmp_path, FakeEngine()) as server:
        answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert "lists and objects" in answer.json()["error"]["message"]


def test_clients_that_never_read_take_bounded_memory_and_nobodys_turn(tmp_path: Path) -> None:
    """What waits for them is at most a context of tokens each, under 1 kB with the likeliest beside each token."""
    context, clients = 2000, 20
    engine = FakeEngine(context=context)
    body = json.dumps({**BODY, "max_tokens": context - 10, "logprobs": 5}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    with serving(tmp_path, engine) as server:
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": [5], "max_tokens": 2}).status_code == 200
        before = psutil.Process(server.process_id).memory_info().rss
        deaf = [socket.create_connection((server.host, server.port)) for _ in range(clients)]
        try:
            for one in deaf:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                one.sendall(request)
            assert engine.wait_for(lambda: len(engine.submitted) == clients + 1 and not engine._requests, 60)
            began = time.monotonic()
            whole = httpx.post(f"{server.url}/v1/completions", json={"prompt": [5], "max_tokens": 2}, timeout=30)
            assert whole.status_code == 200
            assert time.monotonic() - began < 10
            grown = psutil.Process(server.process_id).memory_info().rss - before
            assert grown < clients * context * 2500
        finally:
            for one in deaf:
                one.close()
