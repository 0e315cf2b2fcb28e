"""A card that computes prompts for the processor: slabs for weights, streams, and pinned pages to copy from.

Knows memory and streams, neither layers nor steps.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor

from splitrun.kernels.gpu.matrix import nf4_table
from splitrun.kernels.gpu.unpack import PromptProducts

SLABS = 2
"""One is computed with while the other is filled."""
ALIGNMENT = 256
PAGE_BYTES = 4096
SMALL_BYTES = 64 << 10
"""Smaller tensors are copied to pinned memory instead of being pinned where they lie among others."""

log = logging.getLogger(__name__)


class StreamCard:
    """What the streamed layers of a process share on a card: slabs, streams, and memory for written-out values.

    ``slab_bytes`` is the size of both slabs together.
    """

    def __init__(self, device: torch.device, slab_bytes: int) -> None:
        self.device = device
        self._lock = threading.Lock()
        size = slab_bytes // SLABS // ALIGNMENT * ALIGNMENT
        self.slabs = tuple(torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLABS))
        self.table = nf4_table(device)
        self._products: dict[torch.dtype, PromptProducts] = {}
        self._pinned: list[tuple[int, int]] = []
        on_card = device.type == "cuda"
        self._computing = torch.cuda.Stream(device) if on_card else None
        self._copying = torch.cuda.Stream(device) if on_card else None
        self._arrived = [torch.cuda.Event() if on_card else None for _ in range(SLABS)]
        self._free = [torch.cuda.Event() if on_card else None for _ in range(SLABS)]

    def products(self, dtype: torch.dtype) -> PromptProducts:
        """Products of a type; all layers share their memory."""
        return self._products.setdefault(dtype, PromptProducts(dtype, self.device))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The stream that layers compute on, for one thread at a time. After a fault nothing is under way any more."""
        with self._lock, nullcontext() if self._computing is None else torch.cuda.stream(self._computing):
            well = False
            try:
                yield
                well = True
            finally:
                if not well:
                    self._settle()

    def _settle(self) -> None:
        for stream in (self._copying, self._computing):
            if stream is not None:
                with suppress(RuntimeError):
                    stream.synchronize()

    def arrive(self, slab: int, copy: Callable[[], None]) -> None:
        """Begin to ``copy`` into a slab as soon as nobody computes with it."""
        if self._copying is None:
            copy()
            return
        free, arrived = self._free[slab], self._arrived[slab]
        assert free is not None
        assert arrived is not None
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(free)
            copy()
            arrived.record(self._copying)

    def wait(self, slab: int) -> None:
        """Let the computing stream wait for a slab's contents."""
        arrived = self._arrived[slab]
        if self._computing is not None and arrived is not None:
            self._computing.wait_event(arrived)

    def wait_here(self, slab: int) -> None:
        """Wait until a slab's contents have arrived."""
        arrived = self._arrived[slab]
        if arrived is not None:
            arrived.synchronize()

    def release(self, slab: int) -> None:
        """A slab may be written again once what was launched so far is done."""
        free = self._free[slab]
        if free is not None and self._computing is not None:
            free.record(self._computing)

    def pinned(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors where copies to the card run at full speed: small ones copied, others pinned where they lie.

        A copy must not reach over two pinned ranges: a tensor that would is copied too.
        """
        if self.device.type != "cuda":
            return list(tensors)
        large = [tensor for tensor in tensors if tensor.nbytes >= SMALL_BYTES]
        with torch.cuda.device(self.device):
            for start, stop in without(pages_of(large), self._pinned):
                code = torch.cuda.cudart().cudaHostRegister(start, stop - start, 0)
                if int(code) == 0:
                    self._pinned.append((start, stop))
                    continue
                log.warning("pinning %d bytes for the card failed (%s): prompts take longer", stop - start, code)
                with suppress(RuntimeError):  # the failure is reported once more, by the next launch
                    torch.zeros(1, device=self.device).add_(1)
        return [tensor if self._copies_whole(tensor) else tensor.pin_memory() for tensor in tensors]

    def _copies_whole(self, tensor: Tensor) -> bool:
        """Whether a tensor lies within one pinned range, or wholly outside all of them and is large."""
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        touched = [span for span in self._pinned if span[0] < stop and span[1] > start]
        if not touched:
            return tensor.nbytes >= SMALL_BYTES
        return len(touched) == 1 and touched[0][0] <= start and stop <= touched[0][1]

    def close(self) -> None:
        """Unpin what was pinned, and give the memory back. May be called by every stage that used the card."""
        with self._lock:
            self._settle()
            for start, _ in self._pinned:
                torch.cuda.cudart().cudaHostUnregister(start)
            self._pinned.clear()
            self._products.clear()
            self.slabs = ()


def pages_of(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """The pages that tensors lie on, as disjoint ranges of addresses."""
    spans = sorted(
        (
            tensor.data_ptr() // PAGE_BYTES * PAGE_BYTES,
            -(-(tensor.data_ptr() + tensor.nbytes) // PAGE_BYTES) * PAGE_BYTES,
        )
        for tensor in tensors
    )
    start = stop = 0
    for first, last in spans:
        if first > stop:
            if stop:
                yield start, stop
            start = first
        stop = max(stop, last)
    if stop:
        yield start, stop


def without(spans: Iterable[tuple[int, int]], taken: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of the ranges is in none of those ``taken``: the ends of neighbours share pages."""
    for start, stop in spans:
        rest = start
        for first, last in sorted(taken):
            if first < stop and last > rest:
                if first > rest:
                    yield rest, first
                rest = max(rest, last)
        if rest < stop:
            yield rest, stop
