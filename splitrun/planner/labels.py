"""Every way to share out layers that may still be the fastest within a limit on loss: labels of (seconds, loss).

Goes through one problem of ``search.py``, device set by device set, keeps the pairs that no other beats in both, and
drops what cannot win any more even at the price of loss that bounds most tightly. Knows numbers only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy

from splitrun.planner.losses import Losses
from splitrun.planner.problem import INFINITE, Choice, Floats, Formats, Split, Tables
from splitrun.planner.search import Outcome, Problem, reach_of, runs_of

ROUNDING = 1e-12


@dataclass(frozen=True)
class Label:
    """A way to share out the first layers: seconds, loss, and how it came about."""

    seconds: float
    loss: float
    slot: int
    formats: Formats
    start: int
    stop: int
    before: Label | None


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
        reach: dict[tuple[int, int], list[list[Label]]] = {}
        for mask, last in self.problem.sets:
            for slot in range(len(device)):
                taken = device[slot] in (device[chain.embed], device[chain.head])
                if device[slot] not in last or (taken and slot not in (chain.embed, chain.head)):
                    continue
                front: list[list[Label]] = [[] for _ in range(self.tables.layers + 1)]
                for label in self._extended(reach, mask, slot, rest.behind(mask)[slot], outcome):
                    front[label.stop].append(label)
                reach[mask, slot] = [undominated(labels) for labels in front]
                for label in reach[mask, slot][self.tables.layers]:
                    self._finish(label, mask, outcome)

    def _extended(
        self, reach: dict[tuple[int, int], list[list[Label]]], mask: int, slot: int, rest: Floats, outcome: Outcome
    ) -> Iterator[Label]:
        """Every run of the slot behind every label of the others, and from the first layer, that may still win."""
        chain, before = self.problem.chain, mask ^ (1 << self.problem.chain.device[slot])
        arriving: list[list[tuple[float, Label | None]]] = [[] for _ in range(self.tables.layers + 1)]
        if before == 0:
            arriving[0] = [(float(chain.start[slot]), None)]
        for other in range(len(chain.device)):
            for place, labels in enumerate(reach.get((before, other), ())):
                arriving[place] += [(label.seconds + float(chain.hop[other, slot]), label) for label in labels]
        for choice in self._choices(slot):
            seconds = self._allowed(choice, slot)
            lost = self.losses.runs(choice.ends, choice.formats)
            for start, found in enumerate(arriving):
                for spent, label in found:
                    total = spent + seconds[start, start + 1 :]
                    loss = lost[start, start + 1 :] + (label.loss if label else 0.0)
                    cost = total + self.multiplier * loss + rest[start + 1 :]
                    limit = (outcome.value + self.multiplier * self.most) * (1 + ROUNDING)
                    useful = (total < outcome.value) & (loss <= self.most) & (cost <= limit)
                    for step in numpy.flatnonzero(useful):
                        stop = start + 1 + int(step)
                        yield Label(float(total[step]), float(loss[step]), slot, choice.formats, start, stop, label)

    def _choices(self, slot: int) -> tuple[Choice, ...]:
        chain = self.problem.chain
        return self.tables.slots[slot].choices[slot == chain.embed, slot == chain.head]

    def _allowed(self, choice: Choice, slot: int) -> Floats:
        fits = choice.bytes <= self.problem.caps[self.problem.chain.device[slot]]
        return numpy.where(fits, choice.seconds, INFINITE)

    def _finish(self, label: Label, mask: int, outcome: Outcome) -> None:
        """Place the ends that hold no layers, in every format, and enter the best."""
        chain = self.problem.chain
        outside = [slot for slot in {chain.embed, chain.head} if not mask >> chain.device[slot] & 1]
        for choices in itertools.product(*map(self._choices, outside)):
            seconds, loss = label.seconds + float(chain.end[label.slot]), label.loss
            for slot, choice in zip(outside, choices, strict=True):
                seconds += float(self._allowed(choice, slot)[0, 0])
                loss += float(self.losses.runs(choice.ends, choice.formats)[0, 0])
            if loss <= self.most and seconds < outcome.value:
                formats = {chain.device[slot]: choice.formats for slot, choice in zip(outside, choices, strict=True)}
                outcome.value, outcome.split = seconds, self._split(label, formats)

    def _split(self, last: Label, formats: dict[int, Formats]) -> Split:
        chain, runs = self.problem.chain, []
        label: Label | None = last
        while label is not None:
            device = chain.device[label.slot]
            formats[device] = label.formats
            runs.append((device, label.start, label.stop))
            label = label.before
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


def undominated(labels: Sequence[Label]) -> list[Label]:
    """Those that no other beats in seconds and loss at once."""
    kept: list[Label] = []
    for label in sorted(labels, key=lambda each: (each.seconds, each.loss)):
        if not kept or label.loss < kept[-1].loss:
            kept.append(label)
    return kept
