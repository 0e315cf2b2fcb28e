"""How much memory this process came to hold: main memory above its start, and a card's with its context.

Main memory is the kernel's high-water mark of resident pages, anonymous and file pages alike. A card's is what torch
reserved at most, and the context; where the driver reports more, that. Also holds a card to its budget.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitrun.errors import DoesNotFit
from splitrun.measure.context import DriverFree, card_memory, nvml_free
from splitrun.quantities import format_bytes

STATUS = Path("/proc/self/status")


class MemoryMeter:
    """Made after the imports and before the load: what is resident then is not counted.

    ``budgets`` maps a device to its bytes; a CUDA card is held to its budget from here on: torch may allocate the
    budget less the measured context, so that running over is an error and not a wrong figure.
    """

    def __init__(self, torch: Any, budgets: Mapping[str, int], driver_free: DriverFree = nvml_free) -> None:
        self._torch = torch
        self._contexts: dict[str, int] = {}
        self._free_before: dict[str, int] = {}
        self._driver_free = driver_free
        for name, budget in budgets.items():
            if name.startswith("cuda:"):
                self._hold(name, budget)
        _reset_high_water()
        self.start_bytes = resident_bytes()

    def peak_bytes(self) -> dict[str, int]:
        """Device -> the most that was held so far."""
        peaks = {"cpu": max(0, high_water_bytes() - self.start_bytes)}
        for name, context in self._contexts.items():
            index = _index(name)
            peak = int(self._torch.cuda.max_memory_reserved(index)) + context
            now = self._driver_free(_uuid(self._torch, index))
            if now is not None and name in self._free_before:
                peak = max(peak, self._free_before[name] - now)
            peaks[name] = peak
        return peaks

    def _hold(self, name: str, budget: int) -> None:
        index = _index(name)
        before = self._driver_free(_uuid(self._torch, index))
        memory = card_memory(self._torch, index, self._driver_free)
        if budget <= memory.context_bytes:
            raise DoesNotFit(
                f"{name}: the budget of {format_bytes(budget)} does not even hold the card's context of "
                f"{format_bytes(memory.context_bytes)}; give it more with --memory",
                {name: memory.context_bytes - budget},
            )
        total = int(self._torch.cuda.mem_get_info(index)[1])
        fraction = (budget - memory.context_bytes) / total
        self._torch.cuda.set_per_process_memory_fraction(min(1.0, fraction), index)
        self._contexts[name] = memory.context_bytes
        if before is not None and memory.measured:
            self._free_before[name] = before

    def context_bytes(self, name: str) -> int:
        """The measured context of a card, 0 for anything else."""
        return self._contexts.get(name, 0)


def resident_bytes() -> int:
    """Pages of this process in main memory now."""
    return _status("VmRSS") or _psutil_resident()


def high_water_bytes() -> int:
    """The most pages that this process had in main memory, since the mark was reset if it could be."""
    return _status("VmHWM") or _psutil_resident()


def _reset_high_water() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or not allowed: imports then count if they held more than the load does


def _status(name: str) -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _psutil_resident() -> int:
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)


def _index(name: str) -> int:
    return int(name.partition(":")[2])


def _uuid(torch: Any, index: int) -> str:
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
