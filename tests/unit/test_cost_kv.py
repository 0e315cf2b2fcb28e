"""KV arithmetic: blocks per sequence, pools, bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitrun.planner.facts import KVGroup, UnitProfile, Workload
from splitrun.planner.kv import (
    blocks_per_sequence,
    gathered_kv_bytes,
    history_bytes,
    pool_blocks,
    unit_kv_bytes,
    unit_state_bytes,
)

FULL, LATENT, STATE = KVGroup("full"), KVGroup("latent"), KVGroup("state")


@pytest.mark.parametrize(
    ("group", "context", "chunk", "block", "blocks"),
    [
        (FULL, 4096, 512, 64, 64),
        (FULL, 4097, 512, 64, 65),
        (FULL, 1, 512, 64, 1),
        (LATENT, 100, 512, 16, 7),
        (STATE, 4096, 512, 64, 0),
        (KVGroup("sliding", 1024), 32768, 512, 64, 25),  # 1023 kept + 512 new = 1535 -> 24, and one for the offset
        (KVGroup("sliding", 1024), 1000, 512, 64, 16),  # never more than the whole context
        (KVGroup("sliding", 1), 4096, 1, 64, 2),
        (KVGroup("sliding", 65), 4096, 64, 64, 3),
    ],
)
def test_blocks_per_sequence(group: KVGroup, context: int, chunk: int, block: int, blocks: int) -> None:
    workload = Workload(context=context, chunk_tokens=chunk, block_tokens=block)
    assert blocks_per_sequence(group, workload) == blocks


@pytest.mark.parametrize(("window", "chunk", "block"), [(5, 3, 4), (8, 8, 4), (1, 1, 4), (7, 16, 4), (33, 7, 16)])
def test_a_sliding_group_holds_every_token_that_is_needed(window: int, chunk: int, block: int) -> None:
    """Walk through a prompt: no chunk ever needs more blocks than are counted, and some chunk needs all but one."""
    workload = Workload(context=10_000, chunk_tokens=chunk, block_tokens=block)
    most = 0
    for start in range(0, 2000):
        oldest = max(0, start - window + 1)
        most = max(most, (start + chunk - 1) // block - oldest // block + 1)
    assert most <= blocks_per_sequence(KVGroup("sliding", window), workload) <= most + 1


@pytest.mark.parametrize(
    ("group", "sessions", "override", "blocks"),
    [
        (FULL, 3, None, 12),
        (FULL, 3, 5, 5),
        (FULL, 3, 50, 50),
        (LATENT, 2, 7, 7),
        (KVGroup("sliding", 16), 3, None, 9),
        (KVGroup("sliding", 16), 3, 5, 5),
        (KVGroup("sliding", 16), 3, 500, 9),
        (STATE, 3, None, 0),
        (STATE, 3, 5, 0),
    ],
)
def test_pool_blocks(group: KVGroup, sessions: int, override: int | None, blocks: int) -> None:
    workload = Workload(context=64, sessions=sessions, chunk_tokens=16, block_tokens=16)
    assert pool_blocks(group, workload, override) == blocks


def test_bytes() -> None:
    sliding = KVGroup("sliding", 16)
    workload = Workload(context=64, sessions=2, chunk_tokens=16, block_tokens=16)
    unit = UnitProfile("layer 0", {}, {}, 0.0, {"full": 10, "sliding(16)": 3}, state_bytes=7)
    groups = (FULL, sliding, STATE)
    assert unit_kv_bytes(unit, groups, workload, "bf16") == (10 * 8 + 3 * 6) * 16 * 2
    assert unit_kv_bytes(unit, groups, workload, "fp32", device_blocks=5) == (10 * 5 + 3 * 5) * 16 * 4
    heads = replace(unit, kv_heads=2)  # a scale of four bytes for each
    assert unit_kv_bytes(heads, groups, workload, "int8") == ((10 + 8) * 8 + (3 + 8) * 6) * 16
    assert history_bytes(heads, groups, 40, "int8") == (10 + 8) * 40 + (3 + 8) * 16 + 2 * 7
    assert unit_state_bytes(unit, workload) == 14
    assert gathered_kv_bytes(unit, groups, workload, "bf16") == (10 * 64 + 3 * 48) * 2 * 2
    assert history_bytes(unit, groups, 40, "bf16") == (10 * 40 + 3 * 16) * 2 + 2 * 7


def test_a_sliding_model_pays_for_its_windows_and_not_for_the_context() -> None:
    """Five sliding layers to one full: four times the context costs less than twice the KV."""
    groups = (FULL, KVGroup("sliding", 1024))
    layers = [
        UnitProfile(f"layer {i}", {}, {}, 0.0, {"full" if i % 6 == 5 else "sliding(1024)": 512}) for i in range(12)
    ]

    def total(context: int) -> int:
        return sum(unit_kv_bytes(layer, groups, Workload(context=context), "bf16") for layer in layers)

    assert total(32768) < total(8192) * 3
    assert total(32768) < 12 * 32768 * 512 * 2 / 4
