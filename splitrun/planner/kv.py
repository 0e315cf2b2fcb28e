"""How many KV blocks and bytes a stage needs: integers only. Scheduler and stages are sized from these functions.

Knows which tokens a group keeps; knows nothing of block tables, tiers or tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

from splitrun.planner.facts import SCALE_BYTES, VALUE_BYTES, KVGroup, UnitProfile, Workload


def blocks_per_sequence(group: KVGroup, workload: Workload) -> int:
    """Blocks that one sequence of ``context`` tokens holds at most at a time.

    A sliding group keeps the ``window - 1`` tokens before the oldest query of a chunk and the chunk itself; one block
    more because the oldest kept token seldom starts a block. A state group has a slot per session and no blocks.
    """
    if group.kind == "state":
        return 0
    every = _ceil_div(workload.context, workload.block_tokens)
    if group.kind != "sliding" or group.window is None:
        return every
    kept = group.window - 1 + workload.chunk_tokens
    return min(every, _ceil_div(kept, workload.block_tokens) + 1)


def pool_blocks(group: KVGroup, workload: Workload, device_blocks: int | None = None) -> int:
    """Blocks in a stage's pool for that group: all sessions at full context, or ``device_blocks`` where given.

    A sliding group never takes more than it needs.
    """
    needed = workload.sessions * blocks_per_sequence(group, workload)
    if device_blocks is None or group.kind == "state":
        return needed
    return min(needed, device_blocks) if group.kind == "sliding" else device_blocks


def unit_kv_bytes(
    unit: UnitProfile,
    groups: Iterable[KVGroup],
    workload: Workload,
    dtype: str,
    device_blocks: int | None = None,
) -> int:
    """Bytes of the unit's KV pools, the fixed state of sequences not included (``unit_state_bytes``)."""
    blocks = sum(
        token_bytes(unit, group, dtype) * pool_blocks(group, workload, device_blocks)
        for group in groups
        if group.name in unit.kv_values_per_token
    )
    return blocks * workload.block_tokens


def token_bytes(unit: UnitProfile, group: KVGroup, dtype: str) -> int:
    """Bytes of the unit's K and V of one token in a group that it keeps."""
    return stored_bytes(unit.kv_values_per_token[group.name], unit.kv_heads, dtype)


def stored_bytes(values: int, heads: int, dtype: str) -> int:
    """Bytes of K and V of one token: so many values, in int8 with a scale for each of the heads of K and of V."""
    return values + heads * SCALE_BYTES if dtype == "int8" else values * VALUE_BYTES[dtype]


def unit_state_bytes(unit: UnitProfile, workload: Workload) -> int:
    """Bytes of the unit's fixed per-sequence state: one slot per session."""
    return unit.state_bytes * workload.sessions


def gathered_kv_bytes(unit: UnitProfile, groups: Iterable[KVGroup], workload: Workload, dtype: str) -> int:
    """Bytes of the unit's history of every session gathered into contiguous rows, as attention reads it."""
    values = 0
    for group in groups:
        tokens = min(workload.context, blocks_per_sequence(group, workload) * workload.block_tokens)
        values += unit.kv_values_per_token.get(group.name, 0) * tokens
    return values * workload.sessions * VALUE_BYTES[dtype]


def looked_back(unit: UnitProfile, groups: Iterable[KVGroup], history_tokens: int) -> int:
    """Of a history of that length, the tokens that the unit's attention reads."""
    windows = [group.window for group in groups if group.name in unit.kv_values_per_token]
    if not windows or None in windows:
        return history_tokens
    return min(history_tokens, max(window for window in windows if window is not None))


def kept_tokens(unit: UnitProfile, groups: Iterable[KVGroup], workload: Workload) -> int:
    """The most tokens of history that the unit's attention looks back on."""
    windows = [group.window for group in groups if group.name in unit.kv_values_per_token]
    return max((workload.context if window is None else window for window in windows), default=0)


def history_bytes(unit: UnitProfile, groups: Iterable[KVGroup], history_tokens: int, dtype: str) -> int:
    """Bytes that one token's attention reads of a history of that length, the state (read and written) included."""
    read = 2 * unit.state_bytes
    for group in groups:
        if group.name in unit.kv_values_per_token:
            kept = history_tokens if group.window is None else min(history_tokens, group.window)
            read += token_bytes(unit, group, dtype) * kept
    return read


def _ceil_div(amount: int, size: int) -> int:
    return -(-amount // size)
