"""Memory for packed weights: regions on huge pages, aligned to them, handed out piece by piece.

Scattered 4 KB pages cost a third of the reading speed. A region lives as long as any tensor in it. Knows bytes only.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from splitrun.kernels.cpu.regions import HUGE_PAGE_BYTES, address, give_back, open_region

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

    @contextmanager
    def reserved(self, nbytes: int) -> Iterator[None]:
        """While inside, pieces of ``nbytes`` together lie in one region: less is lost at the ends of regions."""
        with self._lock:
            region = self._open(nbytes)
        try:
            yield
        finally:
            with self._lock:
                if self._region is not None and self._region() is region:
                    give_back(region, self._next)

    def _open(self, nbytes: int) -> mmap.mmap:
        """A new region. One that holds a single large piece is given up for the next piece."""
        region = open_region(nbytes + ALIGNMENT, REGION_BYTES)
        self._next = -address(region) % HUGE_PAGE_BYTES
        self._end = len(region)
        self._region = weakref.ref(region)
        return region


ARENA = Arena()
"""The process's arena: weights of all stages on the CPU lie in it."""
