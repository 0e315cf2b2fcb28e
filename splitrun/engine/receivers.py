"""Tokens to those who wait for them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

from splitrun.schedule.request import TokenEvent

Deliver = Callable[[TokenEvent], None]

_LOG = logging.getLogger(__name__)


class Receivers:
    """Who waits for which request, and what is due to them, the oldest first. All but ``hand_out`` is called under
    ``lock``. ``give_up`` is told, without it, of requests whose receiver failed."""

    def __init__(self, lock: threading.Lock, give_up: Callable[[int], None]) -> None:
        self._lock, self._give_up = lock, give_up
        self._waiting: dict[int, Deliver] = {}
        self._due: deque[tuple[Deliver, TokenEvent]] = deque()

    def add(self, request_id: int, deliver: Deliver) -> None:
        """Expect events of that request."""
        self._waiting[request_id] = deliver

    def remove(self, request_id: int) -> None:
        """Expect none any more; what is due already is dropped."""
        self._waiting.pop(request_id, None)
        self._due = deque(due for due in self._due if due[1].request_id != request_id)

    def owe(self, events: Iterable[TokenEvent]) -> None:
        """Line up events; those that nobody waits for are dropped. Behind its last one nobody waits for a request."""
        for event in events:
            ended = event.finish_reason is not None
            deliver = self._waiting.pop(event.request_id, None) if ended else self._waiting.get(event.request_id)
            if deliver is not None:
                self._due.append((deliver, event))

    def hand_out(self) -> None:
        """Tell the receivers what is due by now. One that raises loses its own request, and nobody else's."""
        for _ in range(len(self._due)):
            with self._lock:
                if not self._due:
                    return  # cancelled meanwhile
                deliver, event = self._due.popleft()
            try:
                deliver(event)
            except Exception as error:  # the receivers' boundary: their faults are not the engine's
                _LOG.error("the receiver of request %d failed: %r", event.request_id, error)
                self._give_up(event.request_id)
