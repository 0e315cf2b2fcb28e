"""Steps that wait to be sent off. Any thread puts them in and any thread sends them; they leave one by one, in order.

Knows nothing of stages.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from splitrun.schedule.step import Step


class Outbox:
    """A queue without a thread of its own."""

    def __init__(self) -> None:
        self._steps: deque[Step] = deque()
        self._sending = threading.Lock()

    @property
    def holds_steps(self) -> bool:
        """Whether steps wait."""
        return bool(self._steps)

    def add(self, step: Step) -> None:
        """Put a step behind those that wait."""
        self._steps.append(step)

    def send(self, submit: Callable[[Step], None]) -> None:
        """Hand all steps to ``submit``. A thread that is at it hands over those of others too, who go on meanwhile."""
        while self._steps and self._sending.acquire(blocking=False):
            try:
                while self._steps:
                    submit(self._steps.popleft())
            finally:
                self._sending.release()
