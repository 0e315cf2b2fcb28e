"""Paged KV accounting for one group: which block ids are free, and which block holds which positions of a sequence.

Integers only. Ids are logical: each stage maps an id to its own place, so nothing here knows of devices, layers or
bytes. Blocks hold ``block_tokens`` consecutive positions: index b holds [b * block_tokens, (b + 1) * block_tokens).
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from splitrun.errors import InvalidPlacement

REPLAY_TOKENS = 16
"""Generated tokens are recomputed in groups of at most this many, through the decode path."""
SCORED_CHUNK_TOKENS = 32
"""Prompts whose log-probabilities are wanted run in shorter chunks: every token of one has a row of logits."""

ABSENT = -1
"""Entry of a block table where there is no block: not yet allocated, or out of the window."""


@dataclass(frozen=True)
class GroupSpec:
    """One paged KV group: ``blocks`` blocks shared by all sequences.

    ``window`` None keeps every token (full and latent groups); otherwise a token attends to itself and the
    ``window`` - 1 tokens before it, and older blocks are freed.
    """

    name: str
    window: int | None
    blocks: int

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise InvalidPlacement(f"KV group {self.name} has {self.blocks} blocks: it needs at least 1")
        if self.window is not None and self.window < 1:
            raise InvalidPlacement(f"KV group {self.name} has window {self.window}: it must be at least 1")


def first_needed_block(context: int, window: int | None, block_tokens: int) -> int:
    """Index of the oldest block that the token at position ``context`` or any later one attends to."""
    if window is None:
        return 0
    return max(0, context - (window - 1)) // block_tokens


def blocks_per_session(window: int | None, context: int, chunk_tokens: int, block_tokens: int) -> int:
    """The most blocks of a group that one sequence of up to ``context`` tokens holds at any moment.

    For a window this counts the window and the largest slice in flight: prompt chunks start at multiples of
    ``chunk_tokens``, those of scored prompts of SCORED_CHUNK_TOKENS, replayed groups of ``REPLAY_TOKENS`` anywhere.
    """
    everything = -(-context // block_tokens)
    if window is None:
        return everything
    peak = 0
    for chunk in {chunk_tokens, min(chunk_tokens, SCORED_CHUNK_TOKENS)}:
        for start in range(0, context, chunk):
            last = (min(start + chunk, context) - 1) // block_tokens
            peak = max(peak, last + 1 - first_needed_block(start, window, block_tokens))
    reach = window - 1 + min(REPLAY_TOKENS, chunk_tokens)
    return min(everything, max(peak, (reach + block_tokens - 2) // block_tokens + 1))


class BlockPool:
    """The block ids of one group. Hands out the lowest free id, so that a run can be repeated."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks))
        self._used: set[int] = set()

    @property
    def free_count(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def used_count(self) -> int:
        """Blocks that some sequence owns."""
        return len(self._used)

    def allocate(self) -> int:
        """Take a block; the caller has checked ``free_count``."""
        assert self._free, "allocate() on an empty block pool"
        block = heapq.heappop(self._free)
        self._used.add(block)
        return block

    def free(self, block: int) -> None:
        """Give a block back; giving back what is not taken is a bug and stops the program."""
        assert block in self._used, f"block {block} is freed but not allocated"
        self._used.remove(block)
        heapq.heappush(self._free, block)

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Assert that every block is free or owned, exactly once. ``owned``: the ids in all live block tables."""
        ids = list(owned)
        assert len(ids) == len(set(ids)), "a block is owned twice"
        assert set(ids) == self._used, f"leaked or foreign blocks: {sorted(set(ids) ^ self._used)}"
        assert sorted([*ids, *self._free]) == list(range(self.blocks)), "the free list does not complement the owned"


class BlockTable:
    """The blocks of one sequence in one group: ``ids[b]`` holds block index b, ``ABSENT`` once out of the window."""

    def __init__(self, pool: BlockPool, window: int | None, block_tokens: int) -> None:
        self.ids = array("i")
        self._pool = pool
        self._window = window
        self._block_tokens = block_tokens
        self._first = 0

    @property
    def held(self) -> int:
        """Number of blocks the sequence owns."""
        return len(self.ids) - self._first

    @property
    def owned(self) -> array[int]:
        """Ids of the blocks the sequence owns, oldest first."""
        return self.ids[self._first :]

    def missing(self, end: int) -> int:
        """How many blocks must be allocated before positions up to ``end`` (exclusive) can be written."""
        return max(0, -(-end // self._block_tokens) - len(self.ids))

    def extend(self, end: int) -> None:
        """Allocate so that positions up to ``end`` (exclusive) are covered; the pool must hold ``missing(end)``."""
        for _ in range(self.missing(end)):
            self.ids.append(self._pool.allocate())

    def droppable(self, context: int) -> int:
        """How many blocks lie wholly before the window of the token at position ``context``."""
        return max(0, min(first_needed_block(context, self._window, self._block_tokens), len(self.ids)) - self._first)

    def drop(self, context: int) -> None:
        """Free the blocks that no token from position ``context`` on attends to."""
        if self._window is None:
            return
        for _ in range(self.droppable(context)):
            self._pool.free(self.ids[self._first])
            self.ids[self._first] = ABSENT
            self._first += 1

    def reaches(self, context: int) -> bool:
        """Whether every block that the token at position ``context`` attends to is still there."""
        return first_needed_block(context, self._window, self._block_tokens) >= self._first

    def release(self) -> None:
        """Free every block; the table is empty afterwards."""
        for block in self.owned:
            self._pool.free(block)
        self.ids = array("i")
        self._first = 0
