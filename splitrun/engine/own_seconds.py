"""What the engine takes beside its stages, measured once: per step, and per hop between two workers of this process.

A real core runs over stages that compute no model but read memory for as long as a small layer would, so that caches
are as cold and threads as sleepy as in earnest. What a token takes beyond the stages' own clocks is the engine's.
Knows scheduler and pipeline; knows no model and no plan.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from splitrun.engine.core import EngineCore
from splitrun.engine.interface import StageStatus
from splitrun.engine.lineup import Line
from splitrun.engine.link import Link
from splitrun.engine.outcome import Outcome
from splitrun.engine.pipeline import Pipeline
from splitrun.engine.process_bytes import process_bytes
from splitrun.measure.cache import Cache
from splitrun.measure.engine_cost import FIGURES, EngineCost, cost_key, cost_of
from splitrun.schedule.request import Request, SamplingParams, TokenEvent
from splitrun.schedule.scheduler import GroupSpec, Limits, Scheduler
from splitrun.schedule.step import RowTokens, Step, Tokens
from splitrun.transport.local import SameMemory, Worker

TOKENS, REQUESTS, ROUNDS = 40, 3, 3
IDLE_S = 0.3
"""How long nothing was asked for before a request: threads, caches and clocks have gone to sleep."""
READ_BYTES = 48 << 20
"""More than the last cache of most processors."""


class ReadingStage:
    """Reads memory, or none, and returns a token where it is the last."""

    def __init__(self, last: bool, read_bytes: int) -> None:
        self._last = last
        self._memory = torch.ones(read_bytes // 4)

    def any_thread(self, step: Step) -> bool:
        """No: the hop to another thread is what is measured."""
        return False

    def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
        """As a stage does."""
        self._memory.sum()
        if not self._last:
            return torch.zeros((int(step.query_starts[-1]), 1))
        return Tokens(step.index, step.epoch, tuple(RowTokens((1,)) for _ in range(step.rows)))

    def close(self) -> None:
        """Nothing is held open."""


def engine_cost(kept: Cache, card: str | None = None) -> EngineCost:
    """What the engine takes beside stages, with ``card`` in use or none: seconds and main memory."""

    def measure() -> dict[str, float]:
        (alone, request, next_request), (two, *_), (warm, *_) = (
            map(median, zip(*(_beside_stages(*shape) for _ in range(ROUNDS)), strict=True))
            for shape in ((1, READ_BYTES, REQUESTS), (2, READ_BYTES), (1, 0))
        )
        own = process_bytes(None)
        both = process_bytes(card) if card else own
        return {
            "step_s": alone,
            "warm_step_s": min(warm, alone),
            "request_s": max(0.0, request - alone),
            "next_request_s": max(0.0, next_request - alone),
            "hop_s": max(0.0, two - alone),
            "process_bytes": own.host,
            "card_process_bytes": both.host - own.host,
            "card_context_bytes": both.context,
            "card_layers_bytes": both.layers_host,
            "card_layers_context_bytes": both.layers_context,
        }

    return cost_of(kept.get_or_measure(cost_key(card), FIGURES, measure))


def _beside_stages(count: int, read_bytes: int, requests: int = 0) -> tuple[float, float, float]:
    """Seconds per further token beyond what the stages' clocks show; and of the first one, the medians of that many
    requests that each come when nothing has been asked for, and of as many that come behind another."""
    workers = [Worker("cpu") for _ in range(count)]
    onward = [SameMemory() if index + 1 < count else None for index in range(count)]
    links = [
        Link(ReadingStage(hop is None, read_bytes), worker, f"stage {index}", hop)
        for index, (worker, hop) in enumerate(zip(workers, onward, strict=True))
    ]
    limits = Limits(context=128, sessions=1, vocabulary=2, chunk_tokens=64, block_tokens=64, depth=count)
    pipelines: list[Pipeline] = []

    def make(deliver: Callable[[Outcome], None]) -> Pipeline:
        pipelines.append(Pipeline(links, deliver))
        return pipelines[0]

    core = EngineCore(
        Scheduler((GroupSpec("full", None, 2),), limits),
        Line(make, (StageStatus("cpu", ""),) * count, {}, lambda: None),
    )

    def beside(tokens: int) -> tuple[float, float]:
        before = [clock.total_s for clock in pipelines[0].clocks]
        first_s, rest_s = _generate(core, tokens)
        inside = sum(clock.total_s - total for total, clock in zip(before, pipelines[0].clocks, strict=True)) / tokens
        return max(0.0, first_s - inside), max(0.0, rest_s / max(tokens - 1, 1) - inside)

    try:
        _generate(core, 2)
        step_s = beside(TOKENS)[1]
        nexts, firsts = [beside(1)[0] for _ in range(requests)], []
        for _ in range(requests):
            time.sleep(IDLE_S)
            firsts.append(beside(1)[0])
        return step_s, median(firsts or [0.0]), median(nexts or [0.0])
    finally:
        core.close()


def _generate(core: EngineCore, count: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    moments: queue.SimpleQueue[tuple[float, TokenEvent]] = queue.SimpleQueue()
    sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    core.submit(Request(count, (1,), sampling), lambda event: moments.put((time.perf_counter(), event)))
    found: list[tuple[float, TokenEvent]] = []
    while not found or found[-1][1].finish_reason is None:
        found.append(moments.get())
    return found[0][0] - start, found[-1][0] - found[0][0]
