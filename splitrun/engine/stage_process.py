"""Entry of a stage process: the pipes to its parent. What it computes is in ``stage_host``.

Told by lines of JSON on standard input: first the job, then who the peers are, each time that changes. Answers on
standard output with ``address``, ``loaded`` and ``connected``, or ``error``; until it is connected it repeats
``alive``. When the input ends, the parent is gone, and so is this process.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO


class Parent:
    """The parent at the other end of the pipes."""

    def __init__(self, reader: TextIO, writer: TextIO) -> None:
        self._reader = reader
        self._writer = writer
        self._lock = threading.Lock()
        self.told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="splitrun parent", daemon=True).start()

    def say(self, **message: Any) -> None:
        """Send a line."""
        with self._lock:
            self._writer.write(json.dumps(message) + "\n")
            self._writer.flush()

    def _listen(self) -> None:
        for line in self._reader:
            self.told.put(json.loads(line))
        os._exit(1)


def beat_until(done: threading.Event, beat_s: float, beat: Callable[[], None]) -> None:
    """Give signs of life from a thread of its own until ``done``."""

    def loop() -> None:
        while not done.wait(beat_s):
            beat()

    threading.Thread(target=loop, name="splitrun alive", daemon=True).start()


def serve(parent: Parent, job: dict[str, Any]) -> None:
    """Load the job's stages and run them until the parent is gone."""
    connected = threading.Event()
    beat_s = float(job["beat_s"])
    beat_until(connected, beat_s, lambda: parent.say(alive=True))
    from splitrun.engine.stage_host import StageHost  # here, because this import alone takes seconds
    from splitrun.errors import SplitrunError

    try:
        host = StageHost(job)
        parent.say(address=host.address)
        parent.say(loaded=host.load())
    except SplitrunError as error:
        parent.say(error=[type(error).__name__, str(error)])
        sys.exit(error.exit_status)
    while True:
        host.connect(parent.told.get()["peers"])
        if not connected.is_set():
            connected.set()
            beat_until(threading.Event(), beat_s, host.beat)
        parent.say(connected=True)


def main() -> None:
    """Entry. What libraries print goes to standard error: standard output is the parent's."""
    writer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    parent = Parent(sys.stdin, writer)
    serve(parent, parent.told.get())


if __name__ == "__main__":
    main()
