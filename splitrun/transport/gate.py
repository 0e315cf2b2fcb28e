"""Lets the right steps through: of this session, of the newest epoch, each once and none left out.

KV blocks hold what the steps before put there, so a step that follows a lost one must not run. Knows numbers only.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

Verdict = Literal["run", "stale", "repeated", "gap"]


class Dropped:
    """Counts what was not let through, by reason. One thread writes, any thread reads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        """Count one."""
        self._counts[reason] += 1

    def counts(self) -> dict[str, int]:
        """Reason -> how often."""
        return dict(self._counts)


class Gate:
    """The order of steps at one stage."""

    def __init__(self) -> None:
        self._epoch = -1
        self._next = 0

    def judge(self, epoch: int, first: int, step: int) -> Verdict:
        """What to do with a step. "run" moves on to the next; a "gap" means that steps were lost on the way.

        ``first`` is the index of the epoch's first step. A newer epoch shuts out all older ones.
        """
        if epoch < self._epoch:
            return "stale"
        if epoch > self._epoch:
            self._epoch, self._next = epoch, first
        if step < self._next:
            return "repeated"
        if step > self._next:
            return "gap"
        self._next += 1
        return "run"
