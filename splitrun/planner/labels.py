"""Every way to share out layers that may still be the fastest within a limit on loss: labels of (seconds, loss).

Goes through one problem of ``search.py``, device set by device set, keeps the pairs that no other beats in both, and
drops what cannot win any more even at the price of loss that bounds most tightly. Labels lie in arrays, which are
extended all at once. Knows numbers only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy

from splitrun.planner.losses import Losses
from splitrun.planner.problem import INFINITE, Choice, Floats, Formats, Integers, Split, Tables
from splitrun.planner.search import Outcome, Problem, reach_of, runs_of

ROUNDING = 1e-12
AT_ONCE = 1 << 20
"""Extensions that are weighed together, at most: some forty bytes of temporaries for each."""


@dataclass(frozen=True)
class Front:
    """Ways to share out the first layers that end with a run of one slot. All arrays have the shape (labels,);
    ``undominated`` puts them in the order of their stops, and for equal stops of their seconds.

    seconds, loss   of everything up to there
    choice          number of the choice that the run was taken from
    start, stop     of the run
    slot, before    the slot in front of it, and which of its labels; -1 for a run from the first layer
    """

    seconds: Floats
    loss: Floats
    choice: Integers
    start: Integers
    stop: Integers
    slot: Integers
    before: Integers

    def at(self, index: Integers) -> Front:
        """Some of them, in that order."""
        return Front(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True)
class Labels:
    """One problem, whose chain is priced with ``multiplier`` for each unit of loss; ``most`` is the limit."""

    tables: Tables
    losses: Losses
    problem: Problem
    multiplier: float
    most: float

    def improve(self, outcome: Outcome) -> None:
        """Enter what is better into ``outcome``."""
        chain, rest = self.problem.chain, _Rest(self.problem)
        device = chain.device
        reach: dict[tuple[int, int], Front] = {}
        for mask, last in self.problem.sets:
            for slot in range(len(device)):
                taken = device[slot] in (device[chain.embed], device[chain.head])
                if device[slot] not in last or (taken and slot not in (chain.embed, chain.head)):
                    continue
                arriving = self._arriving(reach, mask ^ (1 << device[slot]), slot)
                reach[mask, slot] = self._extended(arriving, slot, rest.behind(mask)[slot], outcome)
                self._finish(reach, mask, slot, outcome)

    def _arriving(self, reach: dict[tuple[int, int], Front], before: int, slot: int) -> Front:
        """What the devices of the mask ``before`` have come to, with the hop to the slot: ``start``, by which they are
        ordered, is where its run begins, ``slot`` and ``before`` name the label in front of it."""
        chain = self.problem.chain
        if before == 0:
            return _front([float(chain.start[slot])])
        found = [_front([])]
        for other in range(len(chain.device)):
            front = reach.get((before, other))
            if front is not None:
                seconds, labels = front.seconds + float(chain.hop[other, slot]), numpy.arange(len(front.seconds))
                others = numpy.full_like(labels, other)
                found.append(replace(front, seconds=seconds, start=front.stop, before=labels, slot=others))
        joined = _joined(found)
        return joined.at(numpy.argsort(joined.start, kind="stable"))

    def _extended(self, arriving: Front, slot: int, rest: Floats, outcome: Outcome) -> Front:
        """Every run of the slot behind every label of the others, and from the first layer, that may still win."""
        found = [_front([])]
        limit = (outcome.value + self.multiplier * self.most) * (1 + ROUNDING)
        rows = max(1, AT_ONCE // len(rest))
        for number, choice in enumerate(self._choices(slot) if len(arriving.seconds) else ()):
            seconds, lost = self._allowed(choice, slot), self.losses.runs(choice.ends, choice.formats)
            for first in range(0, len(arriving.seconds), rows):
                part = slice(first, first + rows)
                start = arriving.start[part]
                total = arriving.seconds[part, None] + seconds[start]
                loss = arriving.loss[part, None] + lost[start]
                cost = total + self.multiplier * loss + rest
                useful = (total < outcome.value) & (loss <= self.most) & (cost <= limit)
                useful &= numpy.arange(len(rest)) > start[:, None]
                label, stop = numpy.nonzero(useful)
                place = label + first
                found.append(
                    Front(
                        total[label, stop], loss[label, stop], numpy.full(len(label), number), start[label], stop,
                        arriving.slot[place], arriving.before[place],
                    )
                )  # fmt: skip
        return undominated(_joined(found))

    def _choices(self, slot: int) -> tuple[Choice, ...]:
        chain = self.problem.chain
        return self.tables.slots[slot].choices[slot == chain.embed, slot == chain.head]

    def _allowed(self, choice: Choice, slot: int) -> Floats:
        fits = choice.bytes <= self.problem.caps[self.problem.chain.device[slot]]
        return numpy.where(fits, choice.seconds, INFINITE)

    def _finish(self, reach: dict[tuple[int, int], Front], mask: int, slot: int, outcome: Outcome) -> None:
        """Place the ends that hold no layers, in every format, behind the labels of all layers, and enter the best."""
        chain, front = self.problem.chain, reach[mask, slot]
        whole = numpy.flatnonzero(front.stop == self.tables.layers)
        if not len(whole):
            return
        outside = [end for end in {chain.embed, chain.head} if not mask >> chain.device[end] & 1]
        for choices in itertools.product(*map(self._choices, outside)):
            seconds, loss = front.seconds[whole] + float(chain.end[slot]), front.loss[whole]
            for end, choice in zip(outside, choices, strict=True):
                seconds = seconds + float(self._allowed(choice, end)[0, 0])
                loss = loss + float(self.losses.runs(choice.ends, choice.formats)[0, 0])
            seconds = numpy.where(loss <= self.most, seconds, INFINITE)
            if seconds.min() < outcome.value:
                formats = {chain.device[end]: choice.formats for end, choice in zip(outside, choices, strict=True)}
                best = int(seconds.argmin())
                split = self._split(reach, mask, slot, int(whole[best]), formats)
                outcome.value, outcome.split = float(seconds[best]), split

    def _split(
        self, reach: dict[tuple[int, int], Front], mask: int, slot: int, label: int, formats: dict[int, Formats]
    ) -> Split:
        """The split of a label, traced back run by run; ``formats`` are those of the ends without layers."""
        chain, runs = self.problem.chain, []
        while label >= 0:
            front, device = reach[mask, slot], chain.device[slot]
            formats[device] = self._choices(slot)[int(front.choice[label])].formats
            runs.append((device, int(front.start[label]), int(front.stop[label])))
            mask ^= 1 << device
            slot, label = int(front.slot[label]), int(front.before[label])
        return Split(chain.device[chain.embed], chain.device[chain.head], tuple(reversed(runs)), formats)


class _Rest:
    """What is still to come, at least, behind a part of a chain: found by the same search from the other end."""

    def __init__(self, problem: Problem) -> None:
        chain = problem.chain
        backwards = replace(
            chain, charge=chain.charge[:, ::-1, ::-1].transpose(0, 2, 1), hop=chain.hop.T, start=chain.end,
            end=chain.start, embed=chain.head, head=chain.embed,
        )  # fmt: skip
        self._problem = problem
        reach = reach_of(backwards, runs_of(backwards), problem.sets, {})
        self._tables = {mask: table for mask, (table, _) in reach.items()}
        for members in problem.classes:  # of devices that are alike the sets take one, and any may be meant
            slots = [[slot for slot, device in enumerate(chain.device) if device == member] for member in members]
            for same in map(list, zip(*slots, strict=True)):
                for table in self._tables.values():
                    table[same] = table[same].min(axis=0)
        self._known: dict[int, Floats] = {}

    def behind(self, used: int) -> Floats:
        """The least cost of all that follows, by slot and first layer, when the devices of the mask ``used`` are taken.

        Shape: (slots, n + 1).
        """
        if used not in self._known:
            chain = self._problem.chain
            follow = numpy.full_like(chain.charge[:, 0], INFINITE)
            for mask, table in self._tables.items():
                if self._free(used, mask):
                    follow = numpy.minimum(follow, table[:, ::-1] + self._ends(used | mask))
            rest: Floats = (chain.hop[:, :, None] + follow[None]).min(axis=1)
            rest[:, -1] = chain.end + self._ends(used)
            self._known[used] = rest
        return self._known[used]

    def _free(self, used: int, mask: int) -> bool:
        """Whether there are as many devices of each class as both take."""
        for members in self._problem.classes:
            every = sum(1 << member for member in members)
            if (used & every).bit_count() + (mask & every).bit_count() > len(members):
                return False
        return True

    def _ends(self, used: int) -> float:
        """The cost of ends whose device holds no layers."""
        chain = self._problem.chain
        outside = [slot for slot in {chain.embed, chain.head} if not used >> chain.device[slot] & 1]
        return sum(float(chain.charge[slot, 0, 0]) for slot in outside)


def undominated(front: Front) -> Front:
    """Those that no other with the same stop beats in seconds and loss at once."""
    order = numpy.lexsort((front.loss, front.seconds, front.stop))
    front = front.at(order)
    # Ranks of the losses, those of a later stop all below: what went before is then the least of the same stop.
    ranks = numpy.unique(front.loss, return_inverse=True)[1] - front.stop * (len(order) + 1)
    least = numpy.minimum.accumulate(ranks)
    kept = numpy.ones(len(order), dtype=numpy.bool_)
    kept[1:] = ranks[1:] < least[:-1]
    return front.at(numpy.flatnonzero(kept))


def _front(seconds: Sequence[float]) -> Front:
    """Labels before the first layer."""
    count = len(seconds)
    none, nowhere = numpy.zeros(count, dtype=numpy.int64), numpy.full(count, -1)
    return Front(numpy.array(seconds, dtype=numpy.float64), numpy.zeros(count), none, none, none, nowhere, nowhere)


def _joined(fronts: Sequence[Front]) -> Front:
    return Front(*(numpy.concatenate([getattr(front, field.name) for front in fronts]) for field in fields(Front)))
