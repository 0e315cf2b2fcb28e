"""The planner and the scheduler count a session's blocks each for itself: what is planned must be enough."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from splitrun.planner import memory
from splitrun.planner.facts import KVGroup, UnitProfile, Workload
from splitrun.planner.kv import blocks_per_sequence, unit_kv_bytes
from splitrun.schedule import blocks
from splitrun.schedule.blocks import blocks_per_session
from splitrun.stage.blocks import Int8BlockStore


@pytest.mark.parametrize("window", [None, 1, 4, 128, 511, 512, 513, 4096])
def test_what_is_planned_is_enough_and_hardly_more(window: int | None) -> None:
    group = KVGroup("full") if window is None else KVGroup("sliding", window)
    for context, chunk_tokens, block_tokens in product([64, 600, 8192], [16, 100, 512], [16, 60, 64]):
        workload = Workload(context=context, chunk_tokens=chunk_tokens, block_tokens=block_tokens)
        planned = blocks_per_sequence(group, workload)
        assert 0 <= planned - blocks_per_session(window, context, chunk_tokens, block_tokens) <= 6


def test_int8_blocks_take_what_is_planned() -> None:
    workload = Workload(context=200, sessions=3)
    unit = UnitProfile("layer 0", {}, {}, 0.0, {"full": 2 * 32 + 2 * 16}, kv_heads=2 + 2)
    store = Int8BlockStore(3 * 4, workload.block_tokens, (2, 32), (2, 16), torch.device("cpu"))
    assert store.nbytes == unit_kv_bytes(unit, (KVGroup("full"),), workload, "int8")


def test_the_logits_of_scored_prompts_are_planned_as_they_are_scheduled() -> None:
    assert memory.SCORED_CHUNK_TOKENS == blocks.SCORED_CHUNK_TOKENS
