"""How many bytes of main memory this process holds, and held at most: pages that are resident, of any kind.

Linux tells both and forgets the highest mark when asked to. Knows nothing of what is held.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
FROZEN_BY_NOBODY = 1000
"""Objects that may be frozen without anybody having asked for it: Python 3.12 begins with some hundred."""


def resident_bytes() -> int:
    """Pages of this process in main memory now."""
    return _status("VmRSS") or _psutil_resident()


def high_water_bytes() -> int:
    """The most pages that this process had in main memory, since the mark was reset if it could be."""
    return _status("VmHWM") or _psutil_resident()


def reset_high_water() -> bool:
    """Begin anew with what is held now; False where the system does not allow that."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def give_back() -> None:
    """Return freed pages to the system, so that what is resident is what is used."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: what it keeps counts as used


@contextmanager
def only_new_objects() -> Iterator[None]:
    """While open, ``give_back`` looks for garbage only among what was made since: libraries have a million objects, and
    looking at each takes a quarter of a second every time. What was frozen before stays so."""
    lasting = gc.get_freeze_count() > FROZEN_BY_NOBODY
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not lasting:
            gc.unfreeze()


def _status(name: str) -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _psutil_resident() -> int:
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)
