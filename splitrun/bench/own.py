"""The contestant splitrun: an engine on the placement, driven by token ids alone."""

from __future__ import annotations

import queue
import time

from splitrun.bench.memory import MemoryMeter
from splitrun.bench.terms import Result, Round, Terms, summarise
from splitrun.engine.engine import Engine
from splitrun.engine.interface import TokenEngine
from splitrun.errors import StageLost
from splitrun.planner.placement import Placement
from splitrun.schedule.request import Request, SamplingParams, TokenEvent

SILENCE_S = 600.0


def play(terms: Terms) -> Result:
    """Load the placement, run the rounds. Raises what loading or running raises."""
    placement = Placement.load(terms.placement_file)
    meter = MemoryMeter(terms.budgets)
    start = time.perf_counter()
    with Engine(placement, load="dummy" if terms.load == "dummy" else "weights") as engine:
        load_s = time.perf_counter() - start
        rounds = [play_round(engine.core, terms, number) for number in range(terms.repeat + 1)]
        peaks = meter.peak_bytes()
    shown = dict.fromkeys(placement.device_names, "")
    for stage in placement.stages:
        shown[stage.device] = f"{shown[stage.device]} + {stage.units_text} {stage.weights}".removeprefix(" + ")
    return summarise(terms, load_s, rounds[1:], peaks, shown)


def play_round(engine: TokenEngine, terms: Terms, number: int) -> Round:
    """One request on the terms: its moments. Raises StageLost when it fails or no token comes."""
    events: queue.SimpleQueue[tuple[float, TokenEvent]] = queue.SimpleQueue()
    sampling = SamplingParams(max_tokens=terms.new_tokens, temperature=0.0, ignore_eos=True)
    request = Request(number + 1, tuple(terms.prompt(number)), sampling)
    start = time.perf_counter()
    engine.submit(request, lambda event: events.put((time.perf_counter() - start, event)))
    first, last, count = 0.0, 0.0, 0
    while True:
        try:
            moment, event = events.get(timeout=SILENCE_S)
        except queue.Empty:
            raise StageLost(f"no token came for {SILENCE_S:.0f} s; run the bench again with --debug") from None
        if event.error is not None:
            raise StageLost(event.error)
        if event.token_ids:
            first = first or moment
            last, count = moment, count + len(event.token_ids)
        if event.finish_reason is not None:
            return Round(first, last, count)
