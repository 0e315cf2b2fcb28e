"""How an answer travels: whole or as server-sent events, and never for a client that has hung up.

Knows nothing of what the answer says.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from splitrun.errors import SplitrunError
from splitrun.serve.errors import error_body_of

Task = asyncio.Future[Any]
KEEP_ALIVE_S = 10.0
"""A comment is sent when nothing else was for so long: proxies close silent connections during a long prefill."""
FIRST_CHUNK_S = 5.0
"""An error within this time still gets its own HTTP status; later the stream has begun and carries it."""
_HUNG_UP = Response(status_code=499)


async def hang_up(receive: Receive) -> None:
    """Return when the client has closed the connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(request: Request, work: Coroutine[object, object, BaseModel]) -> Response:
    """The result of the work as JSON; the work is cancelled when the client hangs up."""
    task: Task = asyncio.ensure_future(work)
    gone: Task = asyncio.ensure_future(hang_up(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return _HUNG_UP
        return Response(task.result().model_dump_json(exclude_unset=True), media_type="application/json")
    finally:
        await _stop(task, gone)


async def stream(request: Request, chunks: AsyncGenerator[BaseModel]) -> Response:
    """The chunks as server-sent events, then ``[DONE]``; an error before the first chunk is raised instead."""
    first: Task = asyncio.ensure_future(anext(chunks))
    gone: Task = asyncio.ensure_future(hang_up(request.receive))
    try:
        await asyncio.wait({first, gone}, timeout=FIRST_CHUNK_S, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            first.result()
        elif gone.done():
            await _stop(first)
            await chunks.aclose()
            return _HUNG_UP
    except asyncio.CancelledError:
        await _stop(first)
        await chunks.aclose()
        raise
    finally:
        await _stop(gone)
    return EventStreamResponse(first, chunks)


class EventStreamResponse(Response):
    """Server-sent events. Ends early, and closes ``chunks``, when the client hangs up."""

    def __init__(self, first: Task, chunks: AsyncGenerator[BaseModel]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._first = first
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send chunks as they come, and a comment when none came for a while."""
        gone: Task = asyncio.ensure_future(hang_up(receive))
        current: Task = self._first
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while True:
                await asyncio.wait({current, gone}, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if not current.done():
                    await send({"type": "http.response.body", "body": b": still working\n\n", "more_body": True})
                    continue
                try:
                    data = current.result().model_dump_json(exclude_unset=True)
                except (StopAsyncIteration, SplitrunError) as end:
                    last = json.dumps(error_body_of(end)) if isinstance(end, SplitrunError) else "[DONE]"
                    await send({"type": "http.response.body", "body": f"data: {last}\n\n".encode()})
                    return
                await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
                current = asyncio.ensure_future(anext(self._chunks))
        finally:
            await _stop(gone, current)
            await self._chunks.aclose()


async def _stop(*tasks: Task) -> None:
    """Cancel tasks and wait until they have ended, whatever their outcome."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
