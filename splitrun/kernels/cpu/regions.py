"""Regions of memory on huge pages, and one that is fetched from the system before its size is needed.

The system makes memory while a program first touches it, which takes about as long as reading weights into it. A start
that knows from the last one how much it will need lets that happen beside its imports. Knows neither torch nor tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading

HUGE_PAGE_BYTES = 2 << 20
STEP_BYTES = 32 << 20
LEFT_BYTES = 128 << 20
"""Not fetched ahead: what imports and the tokenizer take for a moment must not come on top of all the weights."""
SLACK_BYTES = 1 << 20
"""Beyond what was asked for: the ends of pieces are rounded up."""
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, since Linux 5.14; where it is not known, pages come as they are touched."""


class _Ahead:
    """The region that was fetched ahead, until it is taken or dropped."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.region: mmap.mmap | None = None
        self.wanted = threading.Event()
        self.fetched_bytes = 0


_ahead = _Ahead()


def fetch_ahead(nbytes: int) -> None:
    """Begin to fetch a region for that many bytes, on a thread of its own. Until `drop_ahead` it may be taken once."""
    with _ahead.lock:
        if _ahead.region is not None:
            return
        _ahead.region = region = new_region(nbytes + SLACK_BYTES)
        _ahead.wanted = wanted = threading.Event()
        wanted.set()
    threading.Thread(target=_populate, args=(region, wanted), name="splitrun memory", daemon=True).start()


def open_region(nbytes: int, least: int) -> mmap.mmap:
    """A region of ``least`` bytes or more, of which ``nbytes`` must fit behind its first huge page's start."""
    with _ahead.lock:
        if _ahead.region is not None and len(_ahead.region) >= nbytes + HUGE_PAGE_BYTES:
            region, _ahead.region, _ahead.fetched_bytes = _ahead.region, None, 0
            return region
    return new_region(max(nbytes, least))


def drop_ahead() -> None:
    """Give back what was fetched ahead and not taken, and stop fetching."""
    with _ahead.lock:
        if _ahead.region is not None:
            _ahead.region, _ahead.fetched_bytes = None, 0
            _ahead.wanted.clear()


def fetched_bytes() -> int:
    """Memory that is held for weights to come: whoever asks how much is free may count it as free."""
    return _ahead.fetched_bytes


def new_region(nbytes: int) -> mmap.mmap:
    """A fresh region for ``nbytes`` behind its first huge page's start."""
    length = nbytes + HUGE_PAGE_BYTES
    if hasattr(mmap, "MAP_PRIVATE"):
        region = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        region = mmap.mmap(-1, length)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without huge pages: slower, not wrong
            region.madvise(mmap.MADV_HUGEPAGE)
    return region


def give_back(region: mmap.mmap, start: int) -> None:
    """Return the region's pages from ``start`` on to the system, whole huge pages only; they read as zero again."""
    start += -(address(region) + start) % HUGE_PAGE_BYTES
    if hasattr(mmap, "MADV_DONTNEED") and start < len(region):
        region.madvise(mmap.MADV_DONTNEED, start)


def address(region: mmap.mmap) -> int:
    """Where the region starts."""
    return ctypes.addressof(ctypes.c_char.from_buffer(region))


def _populate(region: mmap.mmap, wanted: threading.Event) -> None:
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    held = ctypes.c_char.from_buffer(region)
    start, end = ctypes.addressof(held), ctypes.addressof(held) + len(region)
    start += -start % HUGE_PAGE_BYTES
    end -= LEFT_BYTES
    while start < end and wanted.is_set():
        count = min(STEP_BYTES, end - start)
        if advise(ctypes.c_void_p(start), ctypes.c_size_t(count), POPULATE_WRITE):
            return
        start += count
        with _ahead.lock:
            if _ahead.region is region:
                _ahead.fetched_bytes += count
