"""How fast a device reads memory and multiplies, and what a copy to and from the host costs. About 0.2 s per device.

Each figure is the best of several short runs: what disturbs a run only makes it slower. Nothing stays allocated.
Knows nothing of models, plans or budgets; what a *model's layer* takes is another measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from splitrun.planner.facts import Link

if TYPE_CHECKING:
    from collections.abc import Iterator

READ_BYTES = 256 << 20
"""Larger than the caches of nearly every processor and card."""
SMALL_READ_BYTES = 32 << 20
LINK_BYTES = 32 << 20
SMALL_MEMORY_BYTES = 3 << 30
"""Below this much free memory the smaller buffers are used."""
RUN_SECONDS = 0.06


@dataclass(frozen=True)
class Speed:
    """Bytes read per second (for a card: read and written by a copy), floating-point operations per second."""

    bandwidth_bytes_per_s: float
    flops_per_s: float


def host_speed(torch: Any, cores: int, free_bytes: int) -> Speed:
    """Of the processors, with one thread per core."""
    with _threads(torch, cores), torch.inference_mode():
        size = READ_BYTES if free_bytes > SMALL_MEMORY_BYTES else SMALL_READ_BYTES
        buffer = torch.ones(size // 4, dtype=torch.float32)
        return Speed(
            size / best_seconds(buffer.sum, RUN_SECONDS),
            _product_flops(torch, "cpu", torch.bfloat16, lambda: None),
        )


def device_speed(torch: Any, kind: str, name: str, half_type: str, free_bytes: int) -> Speed:
    """Of a card, computing in ``half_type``."""
    settle = synchronizer(torch, kind, name)
    with torch.inference_mode():
        size = READ_BYTES if free_bytes > SMALL_MEMORY_BYTES else SMALL_READ_BYTES
        copy_s = _copy_seconds(torch, name, size, settle)
        dtype = torch.bfloat16 if half_type == "bf16" else torch.float16
        flops = _product_flops(torch, name, dtype, settle)
    release(torch, kind)
    return Speed(2 * size / copy_s, flops)


def _copy_seconds(torch: Any, device: str, size: int, settle: Callable[[], None]) -> float:
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        settle()

    return best_seconds(copy, RUN_SECONDS)


def host_link(torch: Any, kind: str, name: str, to_device: bool) -> Link:
    """Of copies between the host's pinned memory and a card, in one direction."""
    settle = synchronizer(torch, kind, name)
    times = [_link_seconds(torch, kind, name, to_device, size, settle) for size in (4096, LINK_BYTES)]
    release(torch, kind)
    latency, long = times
    return Link(latency, LINK_BYTES / max(long - latency, 1e-9))


def _link_seconds(torch: Any, kind: str, name: str, to_device: bool, size: int, settle: Callable[[], None]) -> float:
    host = torch.empty(size, dtype=torch.uint8, pin_memory=kind != "mps")
    device = torch.empty(size, dtype=torch.uint8, device=name)
    source, target = (host, device) if to_device else (device, host)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        settle()

    return best_seconds(copy, RUN_SECONDS / 3)


def best_seconds(run: Callable[[], object], spend_s: float) -> float:
    """The shortest of at least three runs that together take about ``spend_s``; one run before them warms up."""
    run()
    best, runs, until = float("inf"), 0, time.perf_counter() + spend_s
    while runs < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return max(best, 1e-9)


def _product_flops(torch: Any, device: str, dtype: Any, settle: Callable[[], None]) -> float:
    """Floating-point operations per second of the widest square product that takes up to a few milliseconds."""
    rate = 0.0
    for width in (256, 1024, 4096):
        matrix = torch.ones((width, width), dtype=dtype, device=device)

        def multiply(matrix: Any = matrix) -> None:
            torch.matmul(matrix, matrix)
            settle()

        seconds = best_seconds(multiply, 0.01)
        rate = 2.0 * width**3 / seconds
        if seconds * 64 > 2 * RUN_SECONDS:  # the next is 64 times as long
            break
    return rate


def synchronizer(torch: Any, kind: str, name: str) -> Callable[[], None]:
    """A call that waits until the device has done what was asked of it."""
    wait: Callable[..., None] = getattr(torch, kind).synchronize
    return wait if kind == "mps" else partial(wait, name)


def release(torch: Any, kind: str) -> None:
    """Give the memory that torch keeps for reuse back to the device."""
    getattr(torch, kind).empty_cache()


@contextmanager
def _threads(torch: Any, count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
