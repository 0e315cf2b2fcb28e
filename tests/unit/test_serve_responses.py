"""Streams and answers at the level of ASGI: comments while nothing comes, errors in place, hanging up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from fastapi import Request
from pydantic import BaseModel

from splitrun.errors import QueueFull, SplitrunError, StageLost
from splitrun.serve import responses

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Chunk(BaseModel):
    value: int


class Exchange:
    """A client that can hang up, and what it received."""

    def __init__(self) -> None:
        self.hung_up = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.closed = False
        self.arrived = asyncio.Event()
        self.scope = {"type": "http", "method": "POST", "headers": [], "path": "/"}

    async def receive(self) -> dict[str, Any]:
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.arrived.set()

    @property
    def body(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    async def chunks(self, *steps: int | SplitrunError | asyncio.Event) -> AsyncGenerator[BaseModel]:
        """Numbers become chunks, errors are raised, events are waited for."""
        try:
            for step in steps:
                if isinstance(step, SplitrunError):
                    raise step
                if isinstance(step, int):
                    yield Chunk(value=step)
                else:
                    await step.wait()
        finally:
            self.closed = True

    async def stream(self, *steps: int | SplitrunError | asyncio.Event) -> None:
        response = await responses.stream(Request(self.scope, self.receive), self.chunks(*steps))
        await response(self.scope, self.receive, self.send)


def run(work: Callable[[Exchange], Awaitable[None]]) -> Exchange:
    async def main() -> Exchange:
        exchange = Exchange()
        await asyncio.wait_for(work(exchange), 10)
        return exchange

    return asyncio.run(main())


def test_a_stream_ends_with_done() -> None:
    exchange = run(lambda exchange: exchange.stream(1, 2))
    assert exchange.body == 'data: {"value":1}\n\ndata: {"value":2}\n\ndata: [DONE]\n\n'
    assert (exchange.sent[0]["status"], exchange.closed) == (200, True)
    assert (b"content-type", b"text/event-stream; charset=utf-8") in exchange.sent[0]["headers"]
    assert not exchange.sent[-1].get("more_body")


def test_an_error_before_the_first_chunk_keeps_its_own_status() -> None:
    with pytest.raises(QueueFull):
        run(lambda exchange: exchange.stream(QueueFull("full")))


def test_an_error_after_it_is_the_streams_last_object() -> None:
    exchange = run(lambda exchange: exchange.stream(1, StageLost("gone")))
    assert exchange.body.split("\n\n")[1].startswith('data: {"error": {"message": "gone", "type": "server_error"')
    assert "[DONE]" not in exchange.body
    assert exchange.closed


def test_comments_come_while_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "FIRST_CHUNK_S", 0.0)
    monkeypatch.setattr(responses, "KEEP_ALIVE_S", 0.001)

    async def work(exchange: Exchange) -> None:
        prefill = asyncio.Event()
        task = asyncio.create_task(exchange.stream(prefill, 1))
        while ": still working\n\n: still working" not in exchange.body:
            exchange.arrived.clear()
            await exchange.arrived.wait()
        prefill.set()
        await task

    exchange = run(work)
    assert exchange.body.endswith('data: {"value":1}\n\ndata: [DONE]\n\n')


@pytest.mark.parametrize("first_chunk_s", [0.0, 100.0], ids=["in the stream", "before the stream"])
def test_hanging_up_closes_what_makes_the_chunks(monkeypatch: pytest.MonkeyPatch, first_chunk_s: float) -> None:
    monkeypatch.setattr(responses, "FIRST_CHUNK_S", first_chunk_s)

    async def work(exchange: Exchange) -> None:
        task = asyncio.create_task(exchange.stream(asyncio.Event()))
        await asyncio.sleep(0)
        exchange.hung_up.set()
        await task

    assert run(work).closed


def test_hanging_up_cancels_the_work_on_a_whole_answer() -> None:
    cancelled = []

    async def endless() -> BaseModel:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return Chunk(value=1)

    async def work(exchange: Exchange) -> None:
        task = asyncio.create_task(responses.answer(Request(exchange.scope, exchange.receive), endless()))
        await asyncio.sleep(0)
        exchange.hung_up.set()
        assert (await task).status_code == 499

    run(work)
    assert cancelled == [True]


def test_a_shutdown_during_the_first_wait_closes_the_chunks() -> None:
    async def work(exchange: Exchange) -> None:
        task = asyncio.create_task(exchange.stream(asyncio.Event()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert run(work).closed
