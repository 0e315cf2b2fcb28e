"""The engine's end of the socket to the HTTP process: requests in, token events out.

One thread receives on a ROUTER socket and drives a ``TokenEngine``. Events leave through a second socket, straight
from the thread that delivers them: handing them to another thread first costs 0.7 ms beside a busy one. The sockets
lie in a fresh directory that only this user may enter, or on the loopback where the system has no such sockets; in
both cases a peer must know the random token. Knows nothing of text or of HTTP.
"""

from __future__ import annotations

import hmac
import secrets
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import zmq

from splitrun.engine.interface import EngineStatus, TokenEngine
from splitrun.errors import RequestError, SplitrunError, StageError
from splitrun.schedule.request import TokenEvent
from splitrun.serve.wire import (
    MAX_MESSAGE_BYTES,
    Kind,
    MalformedMessage,
    Message,
    decode,
    encode,
    event_message,
    request_of,
)

_POLL_MS = 50
_WELCOME_POLL_MS = 5
_LOCAL = "ipc://"
_LONGEST_PATH = 100
"""Paths of local sockets may have 103 characters on some systems."""


@dataclass(frozen=True)
class Address:
    """Where the two sockets are, and the token that a peer must send first."""

    control: str
    events: str
    token: str

    def remove(self) -> None:
        """Remove the directory of local sockets. Whoever of the two processes ends last does it."""
        if self.control.startswith(_LOCAL):
            shutil.rmtree(Path(self.control.removeprefix(_LOCAL)).parent, ignore_errors=True)


class EngineService:
    """Serves one engine to HTTP processes. Without an engine yet (``attach``) it reports that the model is loading.

    ``peer_silence_s``: a peer that was not heard for so long is given up and its requests are cancelled; its next
    hello makes it known again. ``peer_ready`` is set once a peer is there.
    """

    def __init__(self, engine: TokenEngine | None = None, peer_silence_s: float = 30.0) -> None:
        self._engine = engine
        self._peer_silence_s = peer_silence_s
        self._context = zmq.Context()
        self._control = self._socket()
        self._events = self._socket()
        self._events.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.address = self._bind()
        self._events_lock = threading.Lock()
        self._heard: dict[bytes, float] = {}
        self._greeted: set[bytes] = set()
        self._owners: dict[int, bytes] = {}
        self._owners_lock = threading.Lock()
        self._closing = threading.Event()
        self.peer_ready = threading.Event()
        self.dropped_messages = 0
        self._thread = threading.Thread(target=self._run, name="http-bridge", daemon=True)
        self._thread.start()

    def attach(self, engine: TokenEngine) -> None:
        """Begin to serve this engine."""
        self._engine = engine

    def close(self) -> None:
        """Cancel what runs, close the sockets, remove their directory. May be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        for peer in list(self._heard):
            self._forget(peer)
        with self._events_lock:
            self._events.close(linger=200)
        self._context.term()
        self.address.remove()

    def _socket(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.SNDHWM, 0)
        return socket

    def _bind(self) -> Address:
        token = secrets.token_hex(32)
        directory = _own_directory() if zmq.has("ipc") else None
        if directory is not None:
            control, events = (f"{_LOCAL}{directory}/{name}" for name in ("control", "events"))
            self._control.bind(control)
            self._events.bind(events)
        else:
            ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (self._control, self._events)]
            control, events = (f"tcp://127.0.0.1:{port}" for port in ports)
        return Address(control, events, token)

    def _run(self) -> None:
        while not self._closing.is_set():
            # Silence is judged by the time before the look into the socket: what arrived until then was read. The
            # time after it may be much later, when a busy thread held this one up.
            now = time.monotonic()
            if self._control.poll(_WELCOME_POLL_MS if self._greeted else _POLL_MS):
                peer, *parts = self._control.recv_multipart()
                try:
                    self._handle(peer, decode(b"".join(parts)))
                except MalformedMessage:
                    self.dropped_messages += 1
            else:
                self._drop_silent_peers(now)
            self._welcome()
        self._control.close(linger=0)

    def _handle(self, peer: bytes, message: Message) -> None:
        """Act on one message. Before its HELLO with the right token, a peer is not listened to."""
        if message.kind is Kind.HELLO:
            token = message.control.get("token")
            if not isinstance(token, str) or not hmac.compare_digest(token.encode(), self.address.token.encode()):
                raise MalformedMessage("the token is wrong")
            if peer not in self._heard:
                self._greeted.add(peer)
                return
        elif peer not in self._heard:
            raise MalformedMessage("a peer spoke before its hello")
        self._heard[peer] = time.monotonic()
        if message.kind is Kind.HELLO:
            self._control.send_multipart([peer, encode(self._status_message())])
        elif message.kind is Kind.SUBMIT:
            self._submit(peer, message)
        elif message.kind is Kind.CANCEL:
            self._cancel(peer, message.request_id)
        else:
            raise MalformedMessage(f"{message.kind.name} is not for the engine")

    def _welcome(self) -> None:
        """Accept the peers that said hello and whose second connection stands too, so that no event goes astray."""
        for peer in list(self._greeted):
            if self._send_event(peer, self._status_message()):
                self._greeted.discard(peer)
                self._heard[peer] = time.monotonic()
                self.peer_ready.set()

    def _submit(self, peer: bytes, message: Message) -> None:
        with self._owners_lock:
            if message.request_id in self._owners:
                raise MalformedMessage("the request id is taken")
            self._owners[message.request_id] = peer
        try:
            if self._engine is None:
                raise StageError("the model is still loading: try again in a moment")
            self._engine.submit(request_of(message), self._deliver)
        except SplitrunError as error:
            with self._owners_lock:
                self._owners.pop(message.request_id, None)
            status = error.http_status if isinstance(error, RequestError | StageError) else 400
            control = {"error": type(error).__name__, "message": str(error), "http_status": status}
            self._send_event(peer, Message(Kind.REFUSED, message.request_id, control))

    def _cancel(self, peer: bytes, request_id: int) -> None:
        with self._owners_lock:
            owned = self._owners.get(request_id) == peer
            if owned:
                del self._owners[request_id]
        if owned and self._engine is not None:
            self._engine.cancel(request_id)

    def _deliver(self, event: TokenEvent) -> None:
        """Send an event to whoever asked. Called from the engine's thread."""
        with self._owners_lock:
            peer = self._owners.get(event.request_id)
            if event.finish_reason is not None:
                self._owners.pop(event.request_id, None)
        if peer is None:
            return
        try:
            self._send_event(peer, event_message(event))
        except MalformedMessage as error:
            # Raised here it would end the engine's thread for everyone.
            failure = TokenEvent(event.request_id, finish_reason="error", error=str(error))
            self._send_event(peer, event_message(failure))
            self._cancel(peer, event.request_id)

    def _send_event(self, peer: bytes, message: Message) -> bool:
        """Send on the events socket, from any thread; whether the peer is there."""
        with self._events_lock:
            if self._events.closed:
                return False
            try:
                self._events.send_multipart([peer, encode(message)], zmq.NOBLOCK)
            except zmq.ZMQError:
                # The peer is gone; its silence or the end of its process cancels the rest.
                return False
        return True

    def _status_message(self) -> Message:
        status = EngineStatus(False, "the model is still loading") if self._engine is None else self._engine.status()
        return Message(Kind.STATUS, 0, status.to_json())

    def _drop_silent_peers(self, now: float) -> None:
        for peer, heard in list(self._heard.items()):
            if now - heard > self._peer_silence_s:
                self._forget(peer)

    def _forget(self, peer: bytes) -> None:
        """Cancel everything that a peer asked for and listen to it no longer."""
        self._heard.pop(peer, None)
        with self._owners_lock:
            owned = [request_id for request_id, owner in self._owners.items() if owner == peer]
        for request_id in owned:
            self._cancel(peer, request_id)
            # If the peer was merely held up, whoever waits there must hear of it.
            end = TokenEvent(
                request_id, finish_reason="error", error=f"cancelled after {self._peer_silence_s:g} s of silence"
            )
            self._send_event(peer, event_message(end))


def _own_directory() -> str | None:
    """A fresh directory for local sockets; None where there is no room for one, or its path is too long for them."""
    try:
        short = len(tempfile.gettempdir()) + len("/splitrun-abcdefgh/control") <= _LONGEST_PATH
        return tempfile.mkdtemp(prefix="splitrun-") if short else None
    except OSError:
        return None
