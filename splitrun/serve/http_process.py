"""The HTTP process: tokenizer, chat template and uvicorn, apart from the engine so that neither waits for the other.

Started by the launcher with its settings as one line of JSON on standard input. While that pipe is open the parent
lives; the line ``drain`` asks to finish what runs and end, the pipe's end to end at once. The parent in turn sees
this process's end at the pipe that was its standard output. Knows nothing of stages.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any, cast

import uvicorn

from splitrun.engine.record import JSON_LOG_VARIABLE, log_json
from splitrun.engine.tokenizer import Tokenizer
from splitrun.errors import SplitrunError, StageError
from splitrun.serve.app import create_app
from splitrun.serve.client import EngineClient
from splitrun.serve.context import ServeContext
from splitrun.serve.guard import Guard, deadline_protocol
from splitrun.serve.metrics import Metrics
from splitrun.serve.service import Address

_LAST_WORDS_S = 1.0
"""Time left of draining for telling clients that their requests end."""


@dataclass(frozen=True)
class HttpSettings:
    """What the HTTP process is told. ``listener`` is the number of an inherited listening socket."""

    address: Address
    listener: int
    model_path: str
    served_name: str
    api_key: str | None
    body_limit_bytes: int
    receive_deadline_s: float
    drain_s: float
    beat_s: float
    silence_s: float
    allowed_hosts: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> HttpSettings:
        """The settings in the launcher's line."""
        return cls(**{**value, "address": Address(**value["address"])})


async def serve_http(settings: HttpSettings, asked: asyncio.Event) -> None:
    """Serve until ``asked`` to drain. Raises StageLost when the engine does not answer."""
    tokenizer = await asyncio.to_thread(Tokenizer.load, settings.model_path)
    if tokenizer.missing_reason:
        print(f"splitrun: {tokenizer.missing_reason}", file=sys.stderr)
    client = EngineClient(settings.address, settings.beat_s, settings.silence_s)
    await client.open()
    context = ServeContext(client, tokenizer, Metrics(lambda: client.status), settings.served_name)
    app = Guard(
        create_app(context),
        metrics=context.metrics,
        api_key=settings.api_key,
        body_limit_bytes=settings.body_limit_bytes,
        receive_deadline_s=settings.receive_deadline_s,
        allowed_hosts=settings.allowed_hosts,
    )
    config = uvicorn.Config(
        app,
        http=deadline_protocol(settings.receive_deadline_s),
        ws="none",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, int(settings.drain_s)),
    )
    server = uvicorn.Server(config)
    draining = asyncio.create_task(_drain(asked, server, client, settings.drain_s))
    listener = socket.socket(fileno=settings.listener)
    try:
        await server.serve(sockets=[listener])
    finally:
        draining.cancel()


async def _obey(parent: asyncio.StreamReader, asked: asyncio.Event, address: Address) -> None:
    """Pass on what the parent says; when it is gone, nobody can be answered any more, so end on the spot, and remove
    what it would have removed."""
    while line := await parent.readline():
        if line.strip() == b"drain":
            asked.set()
    address.remove()
    os._exit(1)


async def _drain(asked: asyncio.Event, server: uvicorn.Server, client: EngineClient, drain_s: float) -> None:
    """Let the server end once asked to. Shortly before the time is over, what still runs is ended with an error that
    its client can read."""
    await asked.wait()
    server.should_exit = True
    await asyncio.sleep(drain_s - min(_LAST_WORDS_S, drain_s / 4))
    await client.end_all(StageError("the server is shutting down and ended this request: send it again later"))


async def run() -> None:
    """Read the settings and serve."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(0, "rb", closefd=False))
    line = await reader.readline()
    if line:
        settings, asked = HttpSettings.from_json(json.loads(line)), asyncio.Event()
        # From the start: a parent that ends while the tokenizer loads must not leave its port taken.
        watcher = asyncio.create_task(_obey(reader, asked, settings.address))
        try:
            await serve_http(settings, asked)
        finally:
            watcher.cancel()


def main() -> None:
    """Entry of the process. What libraries print goes to standard error: standard output is the parent's lifeline."""
    # None counts as not installed: transformers' tokenizers do without torch, which would take 185 MB and 2 s here.
    cast(dict[str, object], sys.modules)["torch"] = None
    os.dup(1)
    os.dup2(2, 1)
    if os.environ.get(JSON_LOG_VARIABLE) == "json":
        log_json("http")
    try:
        asyncio.run(run())
    except SplitrunError as error:
        print(f"splitrun: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
