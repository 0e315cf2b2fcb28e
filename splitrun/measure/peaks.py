"""Temporary bytes: run something once and see how far memory rises above what was held before.

On a processor the rise of resident pages, on a card that of what torch's allocator reserves. 0 where nobody can tell.
Knows nothing of what is run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from splitrun.measure.resident import give_back, high_water_bytes, reset_high_water, resident_bytes


def held_bytes(kind: str, device: str) -> int:
    """Bytes that are held now, for ``peak_of``; begins anew with the highest mark of a card's allocator."""
    give_back()
    if kind == "cpu":
        return resident_bytes()
    if kind != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_reserved(device))


def peak_of(run: Callable[[], object], kind: str, device: str, held: int) -> int:
    """Bytes that ``run`` needs at its highest beyond what was ``held`` before it and everything that ran since.

    What is kept of earlier, smaller steps counts (freed pages, a captured graph's memory): an engine keeps it too.
    """
    if kind == "cpu":
        if not reset_high_water():
            return 0
        run()
        return max(0, high_water_bytes() - held)
    run()
    if kind != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return max(0, int(torch.cuda.max_memory_reserved(device)) - held)


def peak_beyond(run: Callable[[], object], kind: str, device: str) -> int:
    """Bytes that ``run`` needs at its highest, beyond what it leaves behind."""
    give_back()  # what others have left in circles would be freed meanwhile, and count as taken by ``run``
    if kind == "cpu":
        if not reset_high_water():
            return 0
        run()
        peak = high_water_bytes()
        give_back()
        return max(0, peak - resident_bytes())
    if kind != "cuda":
        run()
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = int(torch.cuda.max_memory_reserved(device))
    torch.cuda.empty_cache()
    return max(0, peak - int(torch.cuda.memory_reserved(device)))
