"""How many threads the processor's stages compute with where nobody says: the fastest of a few counts, kept.

Each count is timed on one real step, a decoded token, through the loaded stages. The physical cores that this process
may use come first, and another count must be clearly faster; while others use the processor too, nothing is decided and
nothing kept. Knows stages and clocks; knows no requests and no plan.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from splitrun.measure.cache import Cache
from splitrun.measure.code import code_digest
from splitrun.measure.host import logical_processors, read_processor
from splitrun.measure.unit_steps import Point, make_step, pool_blocks
from splitrun.measure.versions import versions
from splitrun.stage.generic import RangeStage, ThreadCounts

LEAST_BYTES = 64 << 20
"""Stages with fewer weights than this keep the cores: they stay in the caches, and any count is done in a moment."""
CLEARLY = 0.97
"""Another count than the cores must take less than this share of their time."""
OWN_SHARE = 0.8
"""Of each thread's time: what a step that nobody held up had the processor for."""
ROUNDS = 5
COMPUTING = ("splitrun.kernels", "splitrun.stage")
_STEP = Point(rows=1, tokens=1, context=0)


def thread_counts(cores: int, logical: int, environment: Mapping[str, str] = os.environ) -> tuple[int, ...]:
    """Counts to try, the physical cores first; one alone where OMP_NUM_THREADS already says it."""
    if environment.get("OMP_NUM_THREADS", "").isdecimal():
        return (cores,)
    fewer = (cores - cores // 4, cores // 2)
    return tuple(dict.fromkeys(count for count in (cores, logical, *fewer) if count >= 1))


def fastest(timed: Callable[[int], tuple[float, float]], counts: Sequence[int]) -> int | None:
    """The count whose shortest run is the shortest, the first of them unless another is clearly faster.

    ``timed``: seconds of a run with so many threads, and what the processor worked for all of them. None when others
    kept the shortest runs from it: then they tell nothing.
    """
    for count in counts:
        timed(count)
    shortest = {count: min(timed(count) for _ in range(ROUNDS)) for count in counts}
    if any(worked < OWN_SHARE * count * took for count, (took, worked) in shortest.items()):
        return None
    best = min(counts, key=lambda count: shortest[count])
    return best if shortest[best][0] < CLEARLY * shortest[counts[0]][0] else counts[0]


def settle_threads(
    stages: Sequence[RangeStage], block_tokens: int, given: int, kept: Cache | None = None, fast: int | None = None
) -> int:
    """Let the calling thread decode through these stages with the count that is fastest, and return it.

    ``given``: the cores it may use, as prompts do. They stay where there is nothing to choose, and where operators of
    torch compute, whose bits may depend on the number. ``fast``: the count, where other units of the model have told
    it. To be called before the first request: the step writes into the first block.
    """
    counts = thread_counts(given, logical_processors())
    large = sum(stage.weight_bytes for stage in stages) >= LEAST_BYTES
    kernels = all(stage.rules.groups_again and stage.model.dtype != torch.float32 for stage in stages)
    if len(counts) == 1 or not large or not kernels:
        return given
    key = _key(stages, counts)
    known = None if kept is None or kept.refresh else kept.get(key)
    told = int(known["threads"]) if known else fast
    found = told or fastest(_timer(stages, block_tokens), counts)
    if found is not None and not known and kept is not None:
        kept.put(key, {"threads": found})
    torch.set_num_threads(found or given)
    for stage in stages:
        stage.thread_counts = ThreadCounts(decoding=found or given, prompts=given)
    return found or given


def _timer(stages: Sequence[RangeStage], block_tokens: int) -> Callable[[int], tuple[float, float]]:
    """Seconds of a decoded token through the stages, and the processor's, by the number of threads."""
    blocks = pool_blocks([_STEP], block_tokens)
    steps = [make_step(_STEP, stage.rules.groups, block_tokens, blocks) for stage in stages]
    hidden = [
        None if model.cut.embed else torch.zeros(1, model.structure.hidden, dtype=model.dtype)
        for model in (stage.model for stage in stages)
    ]

    def timed(count: int) -> tuple[float, float]:
        torch.set_num_threads(count)
        start, worked = time.perf_counter(), time.process_time()
        for stage, step, incoming in zip(stages, steps, hidden, strict=True):
            stage.run(step, incoming)
        return time.perf_counter() - start, time.process_time() - worked

    return timed


def _key(stages: Sequence[RangeStage], counts: Sequence[int]) -> str:
    """Everything that the choice depends on."""
    ranges = [[stage.model.cut.start, stage.model.cut.stop, stage.model.cut.head] for stage in stages]
    conditions = {
        "processor": [read_processor().name, list(counts)],
        "runtime": versions("cpu"),
        "code": code_digest(*COMPUTING),
        "stages": [[*each, stage.weight_bytes] for each, stage in zip(ranges, stages, strict=True)],
    }
    return f"threads {hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:24]}"
