"""Starts the HTTP process beside an engine, drains both on a signal, and leaves no process behind.

    with Server(ServeOptions(model_path, name)) as server:   # port taken: one line, before anything loads
        server.attach(load_engine())                         # until now /health says 503: loading
        server.wait()                                        # until SIGTERM, SIGINT or stop()

The socket is bound here and handed to the HTTP process. Each side sees the other's end at a pipe. Knows nothing of
HTTP itself.
"""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import json
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from splitrun.child import child_command, child_environment
from splitrun.engine.interface import TokenEngine
from splitrun.errors import InvalidRequest, SplitrunError
from splitrun.serve.service import EngineService

_KILL_MARGIN_S = 5.0


class CannotListen(SplitrunError):
    """The address cannot be listened on."""

    exit_status = 2


class HttpProcessLost(SplitrunError):
    """The HTTP process ended on its own."""


@dataclass(frozen=True)
class ServeOptions:
    """How to serve. ``drain_s`` bounds how long running requests may finish after the first signal; ``silence_s``
    is how long either process may be silent before the other gives it up. ``allowed_hosts``: see `Guard`."""

    model_path: str | Path
    served_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    body_limit_bytes: int = 16 << 20
    receive_deadline_s: float = 30.0
    drain_s: float = 30.0
    beat_s: float = 1.0
    silence_s: float = 30.0
    allowed_hosts: tuple[str, ...] = ()


def serve(engine: TokenEngine, options: ServeOptions) -> None:
    """Serve an engine until SIGTERM or SIGINT, then finish what runs. Raises CannotListen or HttpProcessLost."""
    with Server(options) as server:
        server.attach(engine)
        server.wait()


class Server:
    """An HTTP process and the bridge to it. Use as a context manager: leaving it ends the process."""

    def __init__(self, options: ServeOptions, listener: socket.socket | None = None) -> None:
        """``listener``: a socket that `listen` made already; it is closed with the server."""
        require_usable(options.api_key, options.served_name)
        self.options = options
        self._listener = listener or listen(options.host, options.port)
        self.host, self.port = self._listener.getsockname()[:2]
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        self._service = EngineService(peer_silence_s=options.silence_s)
        self._child = self._start_child()

    @property
    def url(self) -> str:
        """Where clients go, such as http://127.0.0.1:8000."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{shown}:{self.port}"

    @property
    def warning(self) -> str:
        """One line when the server is open to others without a key, else ""."""
        if not self.options.api_key and not ipaddress.ip_address(self.host.split("%")[0]).is_loopback:
            return f"{self.url} is open to everyone who can reach this machine: set --api-key"
        return ""

    @property
    def process_id(self) -> int:
        """The HTTP process."""
        return self._child.pid

    def attach(self, engine: TokenEngine) -> None:
        """Serve this engine from now on."""
        self._service.attach(engine)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the HTTP process answers; raises HttpProcessLost when it does not come up."""
        deadline = time.monotonic() + timeout_s
        while not self._service.peer_ready.wait(0.1):
            if self._child.poll() is not None or time.monotonic() > deadline:
                raise self._lost()

    def wait(self) -> None:
        """Serve until SIGTERM, SIGINT or ``stop``, then drain: refuse what is new, finish what runs within
        ``drain_s``. A second signal ends at once. Raises HttpProcessLost when the HTTP process ends on its own."""
        with self._signals():
            if self._next_event(None) == "ended":
                self._child.wait()
                raise self._lost()
            self._drain()

    def stop(self) -> None:
        """Make ``wait`` drain, as a signal would; a second call ends it at once. For other threads."""
        self._wake_write.send(b"\0")

    def close(self) -> None:
        """End the HTTP process, cancel what runs, free the port. May be called twice."""
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        self._service.close()
        for each in (self._listener, self._wake_read, self._wake_write):
            each.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_child(self) -> subprocess.Popen[bytes]:
        options = dataclasses.asdict(self.options)
        for name in ("host", "port"):
            del options[name]
        settings = {
            **options,
            "model_path": str(self.options.model_path),
            "address": dataclasses.asdict(self._service.address),
            "listener": self._listener.fileno(),
        }
        child = subprocess.Popen(
            child_command("splitrun.serve.http_process"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._listener.fileno()],
            # Its own session, so that Ctrl-C reaches this process alone, which then drains.
            start_new_session=True,
            # transformers would advise to install torch, which this process does without on purpose.
            env=child_environment({"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}),
        )
        self._tell(child, json.dumps(settings))
        return child

    @staticmethod
    def _tell(child: subprocess.Popen[bytes], line: str) -> None:
        if child.stdin is not None:
            try:
                child.stdin.write(line.encode() + b"\n")
                child.stdin.flush()
            except BrokenPipeError:
                # It has ended; whoever waits for it sees that at its other pipe.
                return

    def _drain(self) -> None:
        # The HTTP process closes its copy too; while one is open, the system would still take connections.
        self._listener.close()
        self._tell(self._child, "drain")
        if self._next_event(self.options.drain_s + _KILL_MARGIN_S) == "ended":
            self._child.wait()

    def _next_event(self, timeout_s: float | None) -> str:
        """What comes first: "asked" (a signal or ``stop``), "ended" (the HTTP process), or "timeout"."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ, "asked")
            if self._child.stdout is not None:
                selector.register(self._child.stdout, selectors.EVENT_READ, "ended")
            ready = {str(key.data) for key, _ in selector.select(timeout_s)}
        if "ended" in ready:
            return "ended"
        if "asked" in ready:
            self._wake_read.recv(1)
            return "asked"
        return "timeout"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGTERM and SIGINT into events. Handlers can be set from the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
        previous_fd = signal.set_wakeup_fd(self._wake_write.fileno())
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _lost(self) -> HttpProcessLost:
        status = self._child.poll()
        state = "does not answer" if status is None else f"ended with status {status}"
        return HttpProcessLost(
            f"the HTTP process {state}: its reason stands above, start it again with 'splitrun serve'"
        )


def require_usable(api_key: str | None, served_name: str | None) -> None:
    """Raise InvalidRequest for a key that no client can send, or a name that none can ask for."""
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise InvalidRequest(
            "the API key is empty, or has characters that a header cannot carry: give --api-key (or SPLITRUN_API_KEY) "
            "printable ASCII without blanks at its ends, or leave it out to serve without one"
        )
    if served_name is not None and not (served_name.isprintable() and served_name.strip()):
        raise InvalidRequest(f"the name {served_name!r} cannot be asked for: give --served-name printable characters")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises CannotListen with what mends it."""
    if not 0 <= port < 65536:
        raise CannotListen(f"cannot listen on {host}:{port}: --port must lie between 0 and 65535")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, ValueError) as error:  # a name that is none raises UnicodeError
        raise CannotListen(f"cannot listen on {host}:{port}: {error}: choose another --host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        elsewhere = getattr(error, "errno", None) == errno.EADDRNOTAVAIL
        advice = "--host must be an address of this machine" if elsewhere else "choose another --port (0 picks one)"
        raise CannotListen(f"cannot listen on {host}:{port}: {reason}: {advice}") from error
    return listener
