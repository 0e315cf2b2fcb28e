"""Who waits, who runs, and on which slot and blocks: every change of a sequence's state happens here.

Decides only who yields blocks to whom; which slices form a step is the scheduler's business.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from splitrun.schedule.accounts import BlockAccounts
from splitrun.schedule.blocks import GroupSpec
from splitrun.schedule.limits import Limits
from splitrun.schedule.sequence import Sequence, State


@dataclass(frozen=True)
class Statistics:
    """A glance at the scheduler. ``blocks``: group name -> (in use, there are). Preemptions count since the start."""

    running: int
    waiting: int
    in_flight: int
    preemptions: int
    blocks: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Held:
    """What stages hold of a running sequence: the KV of its first ``tokens`` tokens. ``tables``: group -> block ids,
    ``ABSENT`` where a block was dropped. ``refilling``: some stages have more, the others are on their way there."""

    request_id: int
    slot: int
    tokens: int
    tables: Mapping[str, tuple[int, ...]]
    refilling: bool = False


class Roster:
    """All unfinished sequences. The queue is ordered by arrival, so that one thrown out returns to its place."""

    def __init__(self, groups: tuple[GroupSpec, ...], limits: Limits) -> None:
        self.accounts = BlockAccounts(groups, limits)
        self.live: dict[int, Sequence] = {}
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._sessions = limits.sessions
        self._free_slots = list(range(limits.sessions))
        self._queue: list[tuple[int, Sequence]] = []

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._queue)

    def enqueue(self, sequence: Sequence) -> None:
        """Add a new sequence."""
        self.live[sequence.request.request_id] = sequence
        heapq.heappush(self._queue, (sequence.arrival, sequence))

    def next_candidate(self) -> Sequence | None:
        """The sequence that may start next: first in the queue, a slot free, room for all its known tokens."""
        if not self._queue or not self._free_slots:
            return None
        sequence = self._queue[0][1]
        return sequence if self.accounts.has_room_for(sequence, self.running) else None

    def start(self, sequence: Sequence) -> None:
        """Move the first of the queue onto the lowest free slot."""
        _, first = heapq.heappop(self._queue)
        assert first is sequence, "a sequence starts out of turn"
        sequence.slot = heapq.heappop(self._free_slots)
        sequence.state = State.RUNNING
        self.accounts.open(sequence)
        self.running.append(sequence)

    def suspend(self, sequence: Sequence) -> None:
        """Take slot and blocks from a running sequence and queue it again, before all that came after it."""
        self._leave(sequence)
        sequence.restart()
        heapq.heappush(self._queue, (sequence.arrival, sequence))

    def finish(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; its slot and blocks are free at once (see ``BlockAccounts.release``)."""
        del self.live[sequence.request.request_id]
        if sequence.state is State.RUNNING:
            self._leave(sequence)
        else:
            self._queue.remove((sequence.arrival, sequence))
            heapq.heapify(self._queue)
        sequence.state = State.FINISHED

    def tables(self, sequence: Sequence) -> dict[str, tuple[int, ...]]:
        """Group name -> the blocks of a running sequence."""
        return {name: tuple(table.ids) for name, table in self.accounts.tables(sequence).items()}

    def make_room(self, sequence: Sequence, end: int) -> bool:
        """Preempt the newest sequences behind this one until its blocks up to ``end`` are free; False if in vain.

        Only sequences without a step in flight yield, the one being put together included; where the next in turn has
        one, its tokens are waited for, so that none older yields in its place. Where all of them together hold too
        little, none is preempted: the sequence keeps what it has and waits.
        """
        lacking = self.accounts.shortfall(sequence, end)
        if not lacking:
            return True
        victims: list[Sequence] = []
        candidates = sorted(
            (other for other in self.running if other.arrival > sequence.arrival),
            key=lambda other: other.arrival,
        )
        while any(missing > 0 for missing in lacking.values()):
            if not candidates or candidates[-1].in_flight:
                return False
            victims.append(candidates.pop())
            for name in lacking:
                lacking[name] -= self.accounts.tables(victims[-1])[name].held
        for victim in victims:
            self.suspend(victim)
            victim.preemptions += 1
        self.preemptions += len(victims)
        return True

    def statistics(self, in_flight: int) -> Statistics:
        """Counts of the moment."""
        return Statistics(len(self.running), self.waiting, in_flight, self.preemptions, self.accounts.used())

    def check_integrity(self) -> None:
        """Assert that slots and blocks are owned exactly once and every live sequence is running or waiting."""
        self.accounts.check_integrity(self.running)
        slots = [sequence.slot for sequence in self.running if sequence.slot is not None]
        assert sorted([*slots, *self._free_slots]) == list(range(self._sessions)), "a slot has two owners or none"
        placed = [*self.running, *(sequence for _, sequence in self._queue)]
        assert len(placed) == len(self.live), "a live sequence is neither running nor waiting, or both"
        assert all(self.live.get(one.request.request_id) is one for one in placed), "an ended sequence is still placed"

    def _leave(self, sequence: Sequence) -> None:
        self.accounts.release(sequence)
        self.running.remove(sequence)
        assert sequence.slot is not None, "a running sequence has no slot"
        heapq.heappush(self._free_slots, sequence.slot)
