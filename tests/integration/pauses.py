"""How long clients wait for a token after a fault, for tests that hold it to a bound."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import pytest

import splitrun
from splitrun.engine.remote import RemoteStages
from splitrun.schedule.request import TokenEvent

MOST_S = 5.0
"""Beside starting and loading; two seconds of it may pass before a silent process is given up."""


class Pause:
    """From a fault to the next token that any client gets."""

    def __init__(self, engine: splitrun.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._engine = engine
        self._epoch, self._fault_s = sys.maxsize, math.inf
        self._seconds = math.inf
        owe = engine.core._owe

        def noted(events: list[TokenEvent]) -> None:
            if engine.core._scheduler.epoch > self._epoch and any(event.token_ids for event in events):
                self._seconds = min(self._seconds, time.monotonic() - self._fault_s)
            owe(events)

        monkeypatch.setattr(engine.core, "_owe", noted)

    def begin(self) -> None:
        """The fault happens now."""
        self._epoch, self._fault_s = self._engine.core._scheduler.epoch, time.monotonic()

    def of(self, fault: Callable[[], None]) -> Callable[[], None]:
        """The fault, timed."""

        def timed() -> None:
            self.begin()
            fault()

        return timed

    @property
    def beyond_loading_s(self) -> float:
        """Of the wait, what was not starting and loading."""
        remote = self._engine.core._pipeline._elsewhere
        assert isinstance(remote, RemoteStages)
        return self._seconds - remote.loading_s
