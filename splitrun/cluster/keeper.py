"""The Ray actor of a stage: starts the stage's process on its node, passes lines to and fro, and ends it.

The stage is a process of its own, so that it can be ended whatever it does, and Ray's threads do not compute beside it.
When nobody asks what the stage says or tells it anything for ORPHAN_S, the coordinator is gone or out of reach: the
stage ends and so does the actor. Knows nothing of what the process computes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitrun.child import child_environment
from splitrun.cluster.process import StageProcess
from splitrun.cluster.runtime import OWN_THREADS

ORPHAN_S = 4.0
"""Counted in ticks of its own: when the whole machine stood still, nobody is to blame."""
_TICK_S = 0.25


class Keeper:
    """Keeps one process: ``module`` with ``job`` as its first line. Methods are called through Ray."""

    def __init__(self, name: str, module: str, job: Mapping[str, Any]) -> None:
        self._process = StageProcess(name, job, module, _environment())
        self._unheard_s = 0.0
        threading.Thread(target=self._watch, name="splitrun keeper", daemon=True).start()

    def said(self, wait_s: float) -> list[dict[str, Any]]:
        """What the process said since the last call, waiting for it a little. Its end is ``{"ended": how}``."""
        self._unheard_s = 0.0
        self._process.tell({"alive": True})
        return [{"ended": self._process.end} if one is None else one for one in self._process.said.take(wait_s)]

    def tell(self, message: Mapping[str, Any]) -> None:
        """Pass a line to the process."""
        self._unheard_s = 0.0
        self._process.tell(message)

    def store(self, folder: str, file: str, start: int, data: bytes) -> None:
        """Write a piece of a file that the process has asked for and made."""
        with Path(folder, Path(file).name).open("r+b") as target:
            target.seek(start)
            target.write(data)
            target.flush()
            os.fsync(target.fileno())

    def kill(self) -> int:
        """End the process; returns its id."""
        self._process.kill()
        return self._process.process_id

    def _watch(self) -> None:
        last = time.monotonic()
        while self._unheard_s < ORPHAN_S:
            time.sleep(_TICK_S)
            now = time.monotonic()
            self._unheard_s += min(now - last, 2 * _TICK_S)
            last = now
        self._process.kill()
        os._exit(1)


def _environment() -> dict[str, str]:
    """The environment of the node's own process: Ray gives its workers one thread, a stage has all."""
    environment = child_environment()
    threads = environment.pop(OWN_THREADS, "")
    environment.pop("OMP_NUM_THREADS", None)
    if threads:
        environment["OMP_NUM_THREADS"] = threads
    environment.setdefault("GOMP_SPINCOUNT", "1000")
    return environment
