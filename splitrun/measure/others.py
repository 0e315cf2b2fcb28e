"""Processor time that others take: a figure taken beside somebody's compiler says nothing.

Reads what the kernel counts for the machine and for processes; where nobody counts, nobody is said to disturb.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def machine_busy_s() -> float:
    """Seconds that all processors together have computed since the machine started; 0 where nobody counts."""
    try:
        counts = [int(word) for word in Path("/proc/stat").read_text("ascii").splitlines()[0].split()[1:9]]
        idle = counts[3] + counts[4]
    except (OSError, ValueError, IndexError):
        return 0.0
    return float(sum(counts) - idle) / os.sysconf("SC_CLK_TCK")


def own_s(processes: Sequence[int] = ()) -> float:
    """Seconds that this process has computed, those of it that have ended, and other ``processes`` by their ids."""
    times = os.times()
    ours = times.user + times.system + times.children_user + times.children_system
    return ours + sum(map(_process_s, processes))


def _process_s(process: int) -> float:
    try:
        words = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


class Disturbance:
    """What others take from now on."""

    def __init__(self, processes: Sequence[int] = ()) -> None:
        """``processes`` are ours too."""
        self._processes = processes
        self._before = machine_busy_s() - own_s(processes)

    def seconds(self) -> float:
        """Of processor time so far."""
        busy = machine_busy_s()
        return max(0.0, busy - own_s(self._processes) - self._before) if busy else 0.0
