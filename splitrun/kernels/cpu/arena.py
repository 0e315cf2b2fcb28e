"""Memory for packed weights: regions on huge pages, aligned to them, handed out piece by piece.

Scattered 4 KB pages cost a third of the reading speed. A region lives as long as any tensor in it. Knows bytes only.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from splitrun.kernels.cpu.regions import (
    SMALL_BYTES,
    aligned,
    fetch_pages,
    first_place,
    give_back,
    new_region,
    open_region,
)

REGION_BYTES = 32 << 20


class Arena:
    """Hands out pieces of regions. Safe to use from several threads."""

    def __init__(self, open: Callable[[int, int], mmap.mmap] = open_region) -> None:
        self._open_region = open
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
            start, self._next = self._next, self._next + aligned(nbytes)
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
        region = self._open_region(nbytes, REGION_BYTES)
        self._next = first_place(region)
        self._end = len(region)
        self._region = weakref.ref(region)
        return region


def zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros, on pages that the system makes as they are touched, or when `fetch` has got to them. Shape: (count,)."""
    if count * dtype.itemsize < SMALL_BYTES:
        return torch.zeros(count, dtype=dtype)
    return _ZEROS.empty(count, dtype)  # a piece of a region is handed out once, and pages come as zeros


def fetch(tensors: Sequence[Tensor]) -> None:
    """Have the pages of these made behind what the caller does meanwhile."""
    threading.Thread(target=_fetch, args=(tensors,), name="splitrun memory", daemon=True).start()


def _fetch(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if not fetch_pages(tensor.data_ptr(), tensor.nbytes):
            return


ARENA = Arena()
"""The process's arena: weights of all stages on the CPU lie in it."""
_ZEROS = Arena(lambda nbytes, least: new_region(max(nbytes, least)))
