"""The step behind the one that runs, written down while stages compute: all of it but the tokens, which they tell.

Between two tokens of a stream nothing else is to be done then, and stages can make ready for it before it comes. A
draft is made for the common case alone: every row of the step gets one token, nobody comes, goes or needs a further
block; it is dropped where anything else happens, so that the steps are those that would have been made without it.
Chooses nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from splitrun.schedule.assembly import Row, build_step
from splitrun.schedule.limits import Limits
from splitrun.schedule.roster import Roster
from splitrun.schedule.sequence import Slice, State
from splitrun.schedule.step import Step

Flights = deque[tuple[int, list[Row]]]


@dataclass(frozen=True)
class Draft:
    """The next step with its rows, and zeros for its tokens; ``running`` sequences and ``flights`` are as many as there
    must be when it is used."""

    rows: list[Row]
    step: Step
    running: int
    flights: int

    def suits(self, index: int, epoch: int, roster: Roster, flights: int) -> bool:
        """Whether all has come as expected, and the step is the one with that index."""
        return (
            (index, epoch) == (self.step.index, self.step.epoch)
            and (len(roster.running), flights, roster.waiting) == (self.running, self.flights, 0)
            and all(
                sequence.state is State.RUNNING
                and sequence.in_flight == 0
                and sequence.scheduled == slice_.start
                and sequence.known == slice_.end
                for sequence, slice_ in self.rows
            )
        )  # fmt: skip

    def complete(self) -> Step:
        """The step with its tokens. Modifies the sequences: their slices are scheduled."""
        for row, (sequence, slice_) in enumerate(self.rows):
            sequence.scheduled = slice_.end
            sequence.in_flight += 1
            sequence.last_step = self.step.index
            self.step.token_ids[row] = sequence.output[-1]
        return self.step


def draft(index: int, epoch: int, roster: Roster, flights: Flights, limits: Limits) -> Draft | None:
    """The step that follows the oldest one in flight, as far as it is known; None where it is not."""
    if not flights or roster.waiting or any(group.window is not None for group in roster.accounts.groups):
        return None
    ordered = sorted(flights[0][1], key=lambda row: row[0].arrival)
    rows = [(sequence, Slice(slice_.end, 1, "decode")) for sequence, slice_ in ordered]
    mine = {id(sequence) for sequence, _ in rows}
    others = [sequence for sequence in roster.running if id(sequence) not in mine]
    share = -(-len(roster.running) // (limits.streams or limits.depth))
    if len(rows) > share or any(not other.decoding or other.in_flight == 0 or other.refilling for other in others):
        return None
    for sequence, slice_ in rows:
        alone = sequence.state is State.RUNNING and sequence.in_flight == 1 and not sequence.refilling
        if not alone or sequence.known != slice_.start or slice_.start < sequence.prompt_length:
            return None
        chosen, tables = sequence.request.sampling, roster.accounts.tables(sequence).values()
        ends = slice_.end >= sequence.token_limit
        if ends or chosen.penalizes or any(table.missing(slice_.end) for table in tables):
            return None
    step = build_step(index, epoch, rows, roster.accounts, tokens=False)
    return Draft(rows, step, len(roster.running), len(flights) - 1)
