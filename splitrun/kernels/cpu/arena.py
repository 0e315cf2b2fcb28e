"""Memory for packed weights: regions on huge pages, aligned to them, handed out piece by piece.

Scattered 4 KB pages cost a third of the reading speed. A region lives as long as any tensor in it. Knows bytes only.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
REGION_BYTES = 32 << 20
SMALL_BYTES = 64 << 10
"""Smaller pieces come from torch's allocator: a huge page would be mostly empty."""
ALIGNMENT = 64


class Arena:
    """Hands out pieces of regions. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region: weakref.ref[mmap.mmap] | None = None
        self._next = 0
        self._end = 0

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """Values without contents, at an address that 64 divides. Shape: (count,)."""
        nbytes = count * dtype.itemsize
        if nbytes < SMALL_BYTES:
            return torch.empty(count, dtype=dtype)
        with self._lock:
            region = self._region() if self._region is not None else None
            if region is None or self._next + nbytes > self._end:
                region = self._open(nbytes)
            start, self._next = self._next, self._next + -(-nbytes // ALIGNMENT) * ALIGNMENT
            return torch.frombuffer(region, dtype=dtype, count=count, offset=start)

    def _open(self, nbytes: int) -> mmap.mmap:
        """A new region. One that holds a single large piece is given up for the next piece."""
        length = max(REGION_BYTES, nbytes + ALIGNMENT) + HUGE_PAGE_BYTES
        if hasattr(mmap, "MAP_PRIVATE"):
            region = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            region = mmap.mmap(-1, length)
        address = torch.frombuffer(region, dtype=torch.uint8, count=1).data_ptr()
        self._next = -address % HUGE_PAGE_BYTES
        self._end = length
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without huge pages: slower, not wrong
                region.madvise(mmap.MADV_HUGEPAGE)
        self._region = weakref.ref(region)
        return region


ARENA = Arena()
"""The process's arena: weights of all stages on the CPU lie in it."""
