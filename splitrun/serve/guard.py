"""What stands between the network and the application: hosts, API key, body limits, deadlines for receiving a request.

uvicorn has no deadline for a request that trickles in, so a few slow connections could occupy a server for ever:
``deadline_protocol`` bounds the headers and bodies that nobody reads, ``Guard`` the bodies that are read. A web page
can make its own name lead to the loopback, and so read from a server there through its visitor's browser; but then the
request names that page as its host. Knows nothing of what requests mean.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Collection

import h11
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from splitrun.serve.errors import error_response
from splitrun.serve.metrics import Metrics

_OPEN_PATHS = frozenset({"/health"})
_COUNTED_PATHS = frozenset({
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/placement",
})  # fmt: skip
MOST_BRACKETS = 1 << 17
"""Lists and objects in a body, those in texts counted too: each costs a microsecond of everybody's time."""
_GRACE_S = 5.0
"""How much longer than the guard's answer the protocol waits before it cuts the connection."""


class Guard:
    """Lets through requests that are meant for this server, carry the key, are small enough and arrive in time.

    ``allowed_hosts``: names under which requests may come to the loopback, besides its own. With a key, which no page
    knows, all may.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        api_key: str | None,
        body_limit_bytes: int,
        receive_deadline_s: float,
        allowed_hosts: Collection[str] = (),
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._key = None if api_key is None else api_key.encode()
        self._body_limit_bytes = body_limit_bytes
        self._receive_deadline_s = receive_deadline_s
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, 403, 408 or 413, or let the application answer.

        A request that is cancelled because the server ends (its client does not even read its error) ends quietly.
        """
        try:
            await self._guarded(scope, receive, send)
        except asyncio.CancelledError:
            return

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _COUNTED_PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] not in _OPEN_PATHS and not self._holds_key(headers):
            refusal = error_response("the API key is missing or wrong: send it as 'Authorization: Bearer KEY'", 401)
            await refusal(scope, receive, counted)
        elif self._key is None and not self._is_meant(scope, headers):
            told = (
                f"the host {_host_of(headers)[:200]!r} is not this server: use localhost, or start it with --allow-host"
            )
            await error_response(told, 403)(scope, receive, counted)
        elif self._announced_bytes(headers) > self._body_limit_bytes:
            await error_response(self._too_large(), 413, close=True)(scope, receive, counted)
        else:
            await self._app(scope, self._bounded(receive), counted)

    def _holds_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key or b"")

    def _is_meant(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        """Whether the request's host may be named: any, where the connection came in from outside."""
        came_to = (scope.get("server") or ("",))[0]
        host = _host_of(headers)
        return not _is_loopback(came_to) or not host or _is_loopback(host) or host in self._allowed_hosts

    @staticmethod
    def _announced_bytes(headers: dict[bytes, bytes]) -> int:
        length = headers.get(b"content-length", b"0")
        return int(length) if length.isdigit() else 0

    def _too_large(self) -> str:
        return f"the request is larger than {self._body_limit_bytes} bytes"

    def _bounded(self, receive: Receive) -> Receive:
        """``receive`` that raises 413 or 408 until the body is complete, and then lets everything through."""
        deadline = asyncio.get_running_loop().time() + self._receive_deadline_s
        received = brackets = 0
        complete = False

        async def bounded() -> Message:
            nonlocal received, brackets, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                detail = f"the request did not arrive within {self._receive_deadline_s:g} s"
                raise HTTPException(408, detail) from error
            received += len(message.get("body", b""))
            if received > self._body_limit_bytes:
                raise HTTPException(413, self._too_large())
            brackets += sum(message.get("body", b"").count(mark) for mark in (b"[", b"{"))
            if brackets > MOST_BRACKETS:
                raise HTTPException(413, f"the request has more than {MOST_BRACKETS} lists and objects")
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return bounded


def _host_of(headers: dict[bytes, bytes]) -> str:
    """The host that the request names, without the port; "" for none."""
    named = headers.get(b"host", b"").decode("latin-1").strip().lower()
    return named[1:].partition("]")[0] if named.startswith("[") else named.partition(":")[0].rstrip(".")


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def deadline_protocol(receive_deadline_s: float) -> type[H11Protocol]:
    """uvicorn's HTTP protocol with a deadline for receiving a request."""

    class DeadlineProtocol(H11Protocol):
        """Closes connections whose request does not arrive in time."""

        deadline: asyncio.TimerHandle | None = None
        heard = False

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            super().connection_made(transport)
            self.deadline = self.loop.call_later(receive_deadline_s, self.expire)

        def data_received(self, data: bytes) -> None:
            if not self.heard:
                self.heard = True
                self.disarm()  # the silence before a request is none of its time
            super().data_received(data)
            if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
                self.disarm()
            elif self.deadline is None:
                self.deadline = self.loop.call_later(receive_deadline_s, self.expire)

        def connection_lost(self, exc: Exception | None) -> None:
            self.disarm()
            super().connection_lost(exc)

        def disarm(self) -> None:
            """The request is complete."""
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def expire(self) -> None:
            """Answer 408 to half a head; leave a body to the guard first, then cut the connection."""
            self.deadline = None
            if self.transport.is_closing():
                return
            if self.conn.their_state is h11.SEND_BODY:
                self.deadline = self.loop.call_later(_GRACE_S, self.transport.abort)
                return
            if self.conn.our_state is h11.IDLE:
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()

    return DeadlineProtocol
