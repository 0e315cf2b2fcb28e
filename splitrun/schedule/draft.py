"""The step behind the one that runs, written down while stages compute: all of it but the tokens, which they tell.

Between two tokens of a stream nothing else is to be done then. A draft is made for the common case alone: every row of
the step gets one token, nobody comes, goes or needs a further block; it is dropped where anything else happens, so that
the steps are those that would have been made without it. Chooses nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from splitrun.schedule.assembly import Row, build_step
from splitrun.schedule.limits import Limits
from splitrun.schedule.roster import Roster
from splitrun.schedule.sequence import Slice, State
from splitrun.schedule.step import Step

Flights = deque[tuple[int, list[Row]]]
FILLED_IN = ("index", "epoch", "token_ids")


@dataclass(frozen=True)
class Draft:
    """The rows of the next step and its ``fields`` but those of FILLED_IN; ``running`` sequences and ``flights`` are as
    many as there must be when it is used."""

    rows: list[Row]
    fields: Mapping[str, Any]
    epoch: int
    running: int
    flights: int

    def suits(self, epoch: int, roster: Roster, flights: int) -> bool:
        """Whether all has come as expected."""
        return (
            (epoch, len(roster.running), flights, roster.waiting) == (self.epoch, self.running, self.flights, 0)
            and all(
                sequence.state is State.RUNNING
                and sequence.in_flight == 0
                and sequence.scheduled == slice_.start
                and sequence.known == slice_.end
                for sequence, slice_ in self.rows
            )
        )  # fmt: skip

    def step(self, index: int) -> Step:
        """The step. Modifies the sequences: their slices are scheduled."""
        for sequence, slice_ in self.rows:
            sequence.scheduled = slice_.end
            sequence.in_flight += 1
            sequence.last_step = index
        tokens = numpy.array([sequence.output[-1] for sequence, _ in self.rows], dtype=numpy.int32)
        return Step(index=index, epoch=self.epoch, token_ids=tokens, **self.fields)


def draft(epoch: int, roster: Roster, flights: Flights, limits: Limits) -> Draft | None:
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
    step = build_step(0, epoch, rows, roster.accounts, tokens=False)
    fields = {name: value for name, value in vars(step).items() if name not in FILLED_IN}
    return Draft(rows, fields, epoch, len(roster.running), len(flights) - 1)
