"""Moments in which nothing else wants the processor: a figure taken beside somebody's compiler says nothing.

Reads what the kernel counts of processor time, of the machine and of given processes. Knows nothing of what is run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from splitrun.measure.others import Disturbance

Result = TypeVar("Result")
MOST = 0.04
"""The share of the processors that others may take while something is measured."""
LOOK_S = 0.3
ATTEMPTS = 4


class Calm:
    """Runs things when others hardly want the processor. ``patience_s`` is how long it waits for that in all, and
    how long it repeats what was disturbed; then it takes what it gets."""

    def __init__(self, patience_s: float) -> None:
        self._left = patience_s

    def __call__(self, run: Callable[[], Result], processes: Sequence[int] = ()) -> Result:
        """What ``run`` returns when others hardly disturbed it, or what the least disturbed attempt returned.

        ``processes`` are the ids of ours beside this one.
        """
        best: tuple[float, Result] | None = None
        for _ in range(ATTEMPTS):
            self._wait(processes)
            others, start = Disturbance(processes), time.monotonic()
            result = run()
            spent = time.monotonic() - start
            share = others.seconds() / max(spent * (os.cpu_count() or 1), 1e-9)
            if best is None or share < best[0]:
                best = share, result
            if share <= MOST or self._left <= 0:
                break
            self._left -= spent
        assert best is not None
        return best[1]

    def _wait(self, processes: Sequence[int]) -> None:
        while self._left > 0:
            others = Disturbance(processes)
            time.sleep(LOOK_S)
            if others.seconds() / (LOOK_S * (os.cpu_count() or 1)) <= MOST:
                return
            self._left -= LOOK_S
