"""Block accounting on paper: windows, pools and tables."""

from __future__ import annotations

import random

import pytest

from splitrun.errors import InvalidPlacement
from splitrun.schedule.blocks import BlockPool, BlockTable, GroupSpec, blocks_per_session, first_needed_block


@pytest.mark.parametrize(
    ("context", "window", "first"),
    [
        (0, None, 0),
        (1000, None, 0),
        (0, 4, 0),
        (3, 4, 0),
        (6, 4, 0),  # position 6 attends to 3..6: block 0 holds 0..3
        (7, 4, 1),  # 4..7: block 0 may go
        (10, 4, 1),
        (11, 4, 2),
        (4, 1, 1),  # a token that attends to itself alone
        (3, 1, 0),
    ],
)
def test_first_needed_block(context: int, window: int | None, first: int) -> None:
    assert first_needed_block(context, window, block_tokens=4) == first


@pytest.mark.parametrize(
    ("window", "context", "chunk", "block", "expected"),
    [
        (None, 4096, 512, 64, 64),
        (None, 4097, 512, 64, 65),
        (512, 4096, 512, 64, 16),  # a chunk and the window before it, both aligned
        (512, 600, 512, 64, 10),  # never more than everything
        (1, 4096, 1, 4, 1),
        (4, 4096, 1, 4, 2),  # four tokens anywhere touch two blocks
        (4, 4096, 16, 4, 6),  # 16 replayed tokens anywhere, and three before them
    ],
)
def test_blocks_per_session(window: int | None, context: int, chunk: int, block: int, expected: int) -> None:
    assert blocks_per_session(window, context, chunk, block) == expected


@pytest.mark.parametrize("seed", range(30))
def test_no_way_through_a_sequence_holds_more_than_blocks_per_session(seed: int) -> None:
    """The bound holds for any prompt, and some way through reaches it or comes within a block of it."""
    randomness = random.Random(seed)
    window, context = randomness.choice([1, 3, 8, 20]), 120
    chunk, block = randomness.choice([1, 4, 10, 32]), randomness.choice([1, 4, 8])
    bound, highest = blocks_per_session(window, context, chunk, block), 0
    for prompt in range(1, context):
        pool = BlockPool(context)
        table, position = BlockTable(pool, window, block), 0
        while position < context:
            table.drop(position)
            longest = min(chunk, prompt - position) if position < prompt else min(16, chunk, context - position)
            position += longest
            table.extend(position)
            highest = max(highest, table.held)
    assert bound - 1 <= highest <= bound


def test_the_pool_hands_out_the_lowest_free_block() -> None:
    pool = BlockPool(4)
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, 3]
    pool.free(2)
    pool.free(1)
    assert (pool.free_count, pool.used_count, pool.allocate()) == (2, 2, 1)


def test_an_empty_pool_a_double_free_and_a_foreign_block_are_bugs() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    with pytest.raises(AssertionError, match="empty"):
        pool.allocate()
    pool.free(block)
    with pytest.raises(AssertionError, match="not allocated"):
        pool.free(block)
    with pytest.raises(AssertionError, match="not allocated"):
        pool.free(7)


@pytest.mark.parametrize(("owned", "complaint"), [([0], "leaked"), ([0, 0, 1], "twice"), ([0, 1, 2], "foreign")])
def test_the_integrity_check_finds_leaks_and_double_owners(owned: list[int], complaint: str) -> None:
    pool = BlockPool(3)
    taken = [pool.allocate(), pool.allocate()]
    pool.check_integrity(taken)
    with pytest.raises(AssertionError, match=complaint):
        pool.check_integrity(owned)


def test_a_sliding_table_keeps_the_window_and_marks_the_rest_absent() -> None:
    pool = BlockPool(8)
    table = BlockTable(pool, window=6, block_tokens=4)
    table.extend(13)
    assert (list(table.ids), table.held, table.missing(16), table.missing(17)) == ([0, 1, 2, 3], 4, 0, 1)
    table.drop(13)  # position 13 attends to 8..13
    assert (list(table.ids), table.held, list(table.owned)) == ([-1, -1, 2, 3], 2, [2, 3])
    table.drop(13)
    table.extend(17)
    assert list(table.ids) == [-1, -1, 2, 3, 0]
    table.release()
    assert (pool.free_count, table.held, list(table.ids)) == (8, 0, [])


def test_a_full_table_drops_nothing() -> None:
    table = BlockTable(BlockPool(4), window=None, block_tokens=4)
    table.extend(16)
    table.drop(16)
    assert list(table.ids) == [0, 1, 2, 3]


@pytest.mark.parametrize(("window", "blocks"), [(None, 0), (0, 4), (4, -1)])
def test_impossible_groups_are_refused(window: int | None, blocks: int) -> None:
    with pytest.raises(InvalidPlacement, match="full"):
        GroupSpec("full", window, blocks)
