"""The child's side of a process that `process.StageProcess` starts: lines of JSON to and from the parent.

When the input ends, the parent is gone, and so is this process; where the job has ``orphan_s``, it also ends when the
parent says nothing for that long. Knows nothing of what the process computes.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_TICK_S = 0.25


class Parent:
    """The parent at the other end of the pipes."""

    def __init__(self, reader: TextIO, writer: TextIO) -> None:
        self._reader = reader
        self._writer = writer
        self._lock = threading.Lock()
        self.told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._unheard_s = 0.0
        threading.Thread(target=self._listen, name="splitrun parent", daemon=True).start()

    def say(self, **message: Any) -> None:
        """Send a line; without a parent to read it this process ends."""
        with self._lock:
            try:
                self._writer.write(json.dumps(message) + "\n")
                self._writer.flush()
            except BrokenPipeError:
                os._exit(1)

    def answer(self, key: str) -> Any:
        """Wait for the parent's answer under that key; what it says beside stays for others."""
        aside = []
        while key not in (message := self.told.get()):
            aside.append(message)
        for other in aside:
            self.told.put(other)
        return message[key]

    def require_signs(self, orphan_s: float) -> None:
        """End this process when the parent says nothing for that long, counted in ticks of its own: when the whole
        machine stood still, nobody is to blame."""

        def loop() -> None:
            last = time.monotonic()
            while self._unheard_s < orphan_s:
                time.sleep(_TICK_S)
                now = time.monotonic()
                self._unheard_s += min(now - last, 2 * _TICK_S)
                last = now
            os._exit(1)

        threading.Thread(target=loop, name="splitrun orphan", daemon=True).start()

    def _listen(self) -> None:
        for line in self._reader:
            message = json.loads(line)
            self._unheard_s = 0.0
            if "alive" not in message:
                self.told.put(message)
        os._exit(1)


def end_with_parent() -> None:
    """Let the system end this process with its parent, even while it is stopped. Where it cannot, pipes must do."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, int(signal.SIGKILL))
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)


def beat_until(done: threading.Event, beat_s: float, beat: Callable[[], None]) -> None:
    """Give signs of life from a thread of its own until ``done``."""

    def loop() -> None:
        while not done.wait(beat_s):
            beat()

    threading.Thread(target=loop, name="splitrun alive", daemon=True).start()


def open_parent(serve: Callable[[Parent, dict[str, Any]], None]) -> None:
    """Take the job from the parent and ``serve`` it. What libraries print goes to standard error."""
    writer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    parent = Parent(sys.stdin, writer)
    job = parent.told.get()
    if "orphan_s" in job:
        end_with_parent()
        parent.require_signs(float(job["orphan_s"]))
    serve(parent, job)
