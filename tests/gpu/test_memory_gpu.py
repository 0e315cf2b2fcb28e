"""On a GPU: requests leave no memory behind, and a card without a byte left costs the request that asked for it."""

from __future__ import annotations

import gc
import random
from contextlib import suppress
from typing import Any

import pytest
import torch

import splitrun
from splitrun.errors import StageError
from splitrun.measure.peaks import peak_beyond
from splitrun.planner.facts import Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LAYERS = 8
CARD = torch.device("cuda:0")
GREEDY = splitrun.SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


def half(weights: str) -> Placement:
    """The demo model with four of its layers on the card."""
    stages = (
        StageSpec("cpu", True, (0, 0), False, weights),
        StageSpec("cuda:0", False, (0, 4), False, weights),
        StageSpec("cpu", False, (4, LAYERS), True, weights),
    )
    return Placement(1, ModelRef("demo", layers=LAYERS), Workload(256, sessions=16, block_tokens=16), stages)


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_a_thousand_requests_leave_no_byte_behind(weights: str) -> None:
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 500) for _ in range(draw.randint(1, 240))] for _ in range(100)]
    with splitrun.Engine(half(weights)) as engine:
        for _ in range(2):  # every size of graph, every buffer
            engine.generate(prompts, GREEDY)
        torch.cuda.synchronize(CARD)
        before = (torch.cuda.memory_reserved(CARD), torch.cuda.memory_allocated(CARD))
        free = torch.cuda.mem_get_info(CARD)[0]
        for _ in range(10):
            engine.generate(prompts, GREEDY)
        torch.cuda.synchronize(CARD)
        assert (torch.cuda.memory_reserved(CARD), torch.cuda.memory_allocated(CARD)) == before
        assert free - torch.cuda.mem_get_info(CARD)[0] < 1 << 20


def test_a_full_card_costs_the_request_that_found_it_full() -> None:
    with splitrun.Engine(half("nf4")) as engine:
        short, long = [5, 6, 7], [number % 400 + 3 for number in range(230)]
        wanted = engine.generate([short], GREEDY)[0].token_ids
        held = []
        try:
            total = torch.cuda.mem_get_info(CARD)[1]
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(CARD) / total, CARD)
            for size in (1 << 20, 1 << 16, 1 << 9):  # what was reserved and is in use by nobody
                with suppress(torch.OutOfMemoryError):
                    while True:
                        held.append(torch.empty(size, dtype=torch.uint8, device=CARD))
            with pytest.raises(StageError, match="ran out of memory"):
                engine.generate([long], GREEDY)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, CARD)
            held.clear()
        assert engine.generate([short], GREEDY)[0].token_ids == wanted
        assert engine.generate([long], GREEDY)[0].token_ids


def test_garbage_that_goes_meanwhile_does_not_count_as_taken() -> None:
    """Stages are circles: one that was closed may lie there until something looks for circles."""
    held: list[torch.Tensor] = []

    def load() -> None:
        gc.collect()
        held.append(torch.ones(4 << 20, dtype=torch.uint8, device=CARD))

    peak_beyond(load, "cuda", "cuda:0")
    circle: list[Any] = [torch.ones(64 << 20, dtype=torch.uint8, device=CARD)]
    circle.append(circle)
    del circle
    assert peak_beyond(load, "cuda", "cuda:0") < 32 << 20
