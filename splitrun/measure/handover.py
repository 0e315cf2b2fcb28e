"""What every step takes beside its stages: handing work to a worker's thread and hearing back, measured once.

Knows nothing of stages, nor of what scheduling a step takes.
"""

from __future__ import annotations

import time
from statistics import median

import torch

from splitrun.measure.cache import Cache
from splitrun.transport.local import Worker

ROUNDS = 200


def step_seconds(kept: Cache) -> float:
    """Seconds per step beside stages and hops."""
    key = f"engine step torch {torch.__version__}"
    return kept.get_or_measure(key, ("seconds",), lambda: {"seconds": _round_trip_s()})["seconds"]


def _round_trip_s() -> float:
    worker, times = Worker("cpu"), []
    try:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            worker.call(int)
            times.append(time.perf_counter() - start)
    finally:
        worker.close()
    return median(times)
