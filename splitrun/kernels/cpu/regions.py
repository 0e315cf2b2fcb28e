"""Regions of memory on huge pages, and some that are filled before they are asked for.

A start that knows from the last one what will lie where has weights read beside its imports: into a region that is set
aside, and that the next request for so many bytes gets. Knows neither torch nor tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

HUGE_PAGE_BYTES = 2 << 20
ALIGNMENT = 64
SMALL_BYTES = 64 << 10
"""Smaller pieces lie in no region: a huge page would be mostly empty."""


class Aside:
    """A region whose first pieces are filled until it is handed out or dropped, whichever comes first."""

    def __init__(self, nbytes: int) -> None:
        self.region: mmap.mmap | None = new_region(nbytes)
        self.length = len(self.region)
        self.filled_bytes = 0
        self._lock = threading.Lock()

    def fill(self, place: int, nbytes: int, read: Callable[[memoryview, int], None]) -> bool:
        """Have ``read`` fill the piece that lies ``place`` bytes behind the first, at that address; False: too late.

        Meanwhile the region is not handed out: whoever gets it finds nobody else writing to it.
        """
        with self._lock:
            if self.region is None:
                return False
            start = first_place(self.region) + place
            read(memoryview(self.region)[start : start + nbytes], address(self.region) + start)
            self.filled_bytes += nbytes
            return True

    def take(self) -> mmap.mmap | None:
        """The region, once; nothing is filled any more."""
        with self._lock:
            region, self.region, self.filled_bytes = self.region, None, 0
            return region


_asides: list[Aside] = []
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, since Linux 5.14: makes pages and leaves what is in them. Elsewhere pages come when touched."""


_MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the system call, which the C library does not offer."""
_INTERLEAVE = 3
_STATUS = Path("/proc/self/status")
_PRESENT = Path("/sys/devices/system/node/has_memory")
_MASK_BITS = 1024


def set_aside(nbytes: int) -> Aside:
    """A region for that many bytes, which `open_region` will give to whoever asks for just as many."""
    aside = Aside(nbytes)
    _asides.append(aside)
    return aside


def open_region(nbytes: int, least: int) -> mmap.mmap:
    """A region of ``least`` bytes or more, of which ``nbytes`` must fit behind its first huge page's start."""
    for aside in list(_asides):
        if aside.length == nbytes + HUGE_PAGE_BYTES:
            _asides.remove(aside)
            region = aside.take()
            if region is not None:
                return region
    return new_region(max(nbytes, least))


def drop_asides() -> None:
    """Give back what was set aside and not asked for."""
    while _asides:
        _asides.pop().take()


def filled_bytes() -> int:
    """Memory that is held for weights to come: whoever asks how much is free may count it as free."""
    return sum(aside.filled_bytes for aside in list(_asides))


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
    nodes = memory_nodes()
    if len(nodes) > 1:
        interleave(region, nodes)
    return region


def memory_nodes(status: Path = _STATUS, present: Path = _PRESENT) -> list[int]:
    """Nodes of a machine of several sockets whose memory this process may use; empty where the system does not say."""
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        online = present.read_text(encoding="ascii")
    except OSError:
        return []
    allowed = next((line.split()[1] for line in lines if line.startswith("Mems_allowed_list:")), "")
    return sorted(_numbers(allowed) & _numbers(online.strip()))


def _numbers(text: str) -> set[int]:
    """What a list such as ``0-1,4`` names."""
    ranges = [part.partition("-") for part in text.split(",") if part]
    return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}


def interleave(region: mmap.mmap, nodes: Sequence[int]) -> bool:
    """Have the region's pages come from these nodes in turn, wherever the thread that touches them first may run.

    Threads of all sockets read weights together, so one socket's memory would be half as fast. False: not possible.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return False
    mask = sum(1 << node for node in nodes if node < _MASK_BITS).to_bytes(_MASK_BITS // 8, "little")
    try:
        call = ctypes.CDLL(None).syscall
    except (OSError, AttributeError):
        return False
    start, length = ctypes.c_void_p(address(region)), ctypes.c_size_t(len(region))
    bits = ctypes.c_ulong(_MASK_BITS)
    return bool(
        call(ctypes.c_long(number), start, length, ctypes.c_long(_INTERLEAVE), mask, bits, ctypes.c_long(0)) == 0
    )


def fetch_pages(start: int, nbytes: int) -> bool:
    """Have the system make the pages between these addresses, a huge page at a time; False where it cannot.

    It makes memory while a program first touches it, which takes about as long as reading weights into it.
    """
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return False
    end = start + nbytes
    start -= start % mmap.PAGESIZE
    while start < end:
        count = min(HUGE_PAGE_BYTES - start % HUGE_PAGE_BYTES, end - start)
        if advise(ctypes.c_void_p(start), ctypes.c_size_t(count), POPULATE_WRITE):
            return False
        start += count
    return True


def give_back(region: mmap.mmap, start: int) -> None:
    """Return the region's pages from ``start`` on to the system, whole huge pages only; they read as zero again."""
    start += -(address(region) + start) % HUGE_PAGE_BYTES
    if hasattr(mmap, "MADV_DONTNEED") and start < len(region):
        region.madvise(mmap.MADV_DONTNEED, start)


def address(region: mmap.mmap) -> int:
    """Where the region starts."""
    return ctypes.addressof(ctypes.c_char.from_buffer(region))


def first_place(region: mmap.mmap) -> int:
    """Where in the region its first piece lies: at the start of a huge page."""
    return -address(region) % HUGE_PAGE_BYTES


def aligned(nbytes: int) -> int:
    """The room that a piece takes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
