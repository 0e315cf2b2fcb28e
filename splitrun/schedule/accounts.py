"""The KV blocks of all running sequences, over all groups: who holds what, and whether there is room.

Knows nothing of order or fairness: the scheduler asks and decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from splitrun.schedule.blocks import BlockPool, BlockTable, GroupSpec, blocks_per_session
from splitrun.schedule.limits import Limits
from splitrun.schedule.sequence import Sequence

Tables = Mapping[str, BlockTable]


class BlockAccounts:
    """One pool per group, one table per group and running sequence."""

    def __init__(self, groups: tuple[GroupSpec, ...], limits: Limits) -> None:
        self.groups = groups
        self._block_tokens = limits.block_tokens
        self._pools = {group.name: BlockPool(group.blocks) for group in groups}
        self._tables: dict[Sequence, Tables] = {}
        self._peaks = {
            group.name: blocks_per_session(group.window, limits.context, limits.chunk_tokens, limits.block_tokens)
            for group in groups
        }

    def open(self, sequence: Sequence) -> None:
        """Give a sequence empty tables."""
        assert sequence not in self._tables, "a sequence is opened twice"
        self._tables[sequence] = {
            group.name: BlockTable(self._pools[group.name], group.window, self._block_tokens) for group in self.groups
        }

    def tables(self, sequence: Sequence) -> Tables:
        """Group name -> the block table of a running sequence."""
        return self._tables[sequence]

    def release(self, sequence: Sequence) -> None:
        """Free all blocks of a running sequence.

        Steps that still write them may be in flight: every stage runs steps in order, so a later step that reuses a
        block overwrites it after the stale write on every stage, and reads only what itself or its successors wrote.
        """
        for table in self._tables.pop(sequence).values():
            table.release()

    def drop_outside_windows(self, sequence: Sequence) -> None:
        """Free the blocks that no slice still to be scheduled attends to.

        To be called between steps, not while one is put together: the slices of a step run side by side, and one must
        not write a block that another reads.
        """
        for table in self._tables[sequence].values():
            table.drop(sequence.scheduled)

    def reaches(self, sequence: Sequence, position: int) -> bool:
        """Whether the running sequence still holds all that its token at ``position`` attends to."""
        return all(table.reaches(position) for table in self._tables[sequence].values())

    def shortfall(self, sequence: Sequence, end: int) -> dict[str, int]:
        """Group name -> blocks lacking before positions up to ``end`` can be written; empty when there is room."""
        lacking: dict[str, int] = {}
        for name, table in self._tables[sequence].items():
            missing = table.missing(end) - self._pools[name].free_count
            if missing > 0:
                lacking[name] = missing
        return lacking

    def extend(self, sequence: Sequence, end: int) -> None:
        """Allocate so that positions up to ``end`` are covered; there must be no shortfall."""
        for table in self._tables[sequence].values():
            table.extend(end)

    def has_room_for(self, candidate: Sequence, running: Collection[Sequence]) -> bool:
        """Whether ``candidate`` can compute all its known tokens beside the running ones.

        What the running ones need for their own known tokens is set aside, and at least one block for each of them to
        grow into: a sequence admitted into the last free blocks would only be thrown out again.
        """
        for name, pool in self._pools.items():
            promised = sum(self._promised(sequence, name) for sequence in running)
            if self._needed(candidate, name) > pool.free_count - promised:
                return False
        return True

    def _needed(self, sequence: Sequence, group: str) -> int:
        return min(-(-sequence.known // self._block_tokens), self._peaks[group])

    def _promised(self, sequence: Sequence, group: str) -> int:
        if sequence.decoding:
            return 1
        return max(1, self._needed(sequence, group) - self._tables[sequence][group].held)

    def used(self) -> dict[str, tuple[int, int]]:
        """Group name -> (blocks in use, blocks there are)."""
        return {name: (pool.used_count, pool.blocks) for name, pool in self._pools.items()}

    def check_integrity(self, running: Collection[Sequence]) -> None:
        """Assert that exactly the running sequences own blocks, and no block has two owners or none."""
        assert set(self._tables) == set(running), "block tables and running sequences differ"
        for name, pool in self._pools.items():
            pool.check_integrity(block for tables in self._tables.values() for block in tables[name].owned)
