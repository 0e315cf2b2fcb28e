"""The fastest split within a limit on lost precision: as ``search.py``, with losses beside seconds.

For the busiest device: the least loss under a ceiling on every device's seconds, and the lowest ceiling whose loss is
within the limit. For a sum of seconds: a price for loss that balances seconds and loss gives a plan and a bound
(Lagrange); splits that the bound does not rule out are gone through, with every pair of (seconds, loss) that no other
beats in both. Both are exact. It takes longer, and is asked only when the fastest split of all loses too much.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy

from splitrun.planner.facts import FORMATS, ModelProfile
from splitrun.planner.problem import INFINITE, Choice, Floats, Split, Tables, seconds_of
from splitrun.planner.quality import unit_loss
from splitrun.planner.search import Outcome, Price, Problem, best_of, problems, reach_of, runs_of

ROUNDING = 1e-12
CLOSE = 1e-9
"""Limits are stretched by as much, so that a plan may lie on one."""


@dataclass(frozen=True)
class Losses:
    """Loss of the ends and, summed up, of the layers, per format number."""

    embed: dict[int, float]
    head: dict[int, float]
    ahead: dict[int, Floats]

    @classmethod
    def of(cls, profile: ModelProfile, tables: Tables) -> Losses:
        """The losses in every format that the tables name."""
        numbers = {choice.number for slot in tables.slots for choice in slot.choices}
        units = range(len(profile.units))
        found = {number: [unit_loss(profile, unit, FORMATS[number]) for unit in units] for number in numbers}
        return cls(
            {number: values[0] for number, values in found.items()},
            {number: values[-1] for number, values in found.items()},
            {number: numpy.concatenate([[0.0], numpy.cumsum(values[1:-1])]) for number, values in found.items()},
        )

    def runs(self, number: int, embed: bool, head: bool) -> Floats:
        """What a device in that format loses with each run of layers. Shape: (n + 1, n + 1)."""
        ends = self.embed[number] * embed + self.head[number] * head
        return ends + self.ahead[number][None, :] - self.ahead[number][:, None]

    def split(self, split: Split) -> float:
        """What a whole split loses."""
        bounds = dict.fromkeys((split.embed, split.head), (0, 0)) | {each[0]: each[1:] for each in split.runs}
        return sum(
            float(self.runs(split.formats[device], device == split.embed, device == split.head)[run])
            for device, run in bounds.items()
        )


def fastest_within(tables: Tables, profile: ModelProfile, bottleneck: bool, most: float) -> Outcome:
    """The split of least seconds (on its busiest device) whose loss is at most ``most``; no split when none fits.

    Values of sets of devices are not gathered.
    """
    losses = Losses.of(profile, tables)
    if bottleneck:
        return _lowest_ceiling(tables, losses, most)
    found, multiplier = _balanced(tables, losses, most)
    if found is None:
        return Outcome()
    outcome = Outcome(found.seconds, found.split)
    if found.cost(multiplier) - multiplier * most >= found.seconds * (1 - CLOSE):
        return outcome  # the bound itself
    for problem in problems(tables, weighted(losses, multiplier), False, True):
        _Within(tables, losses, problem, multiplier, most).improve(outcome)
    return replace(outcome, by_devices={})


def weighted(losses: Losses, multiplier: float, ceiling: float = INFINITE) -> Price:
    """Seconds and ``multiplier`` times the loss, of runs that keep the cap; under a ceiling, loss alone."""

    def price(choice: Choice, embed: bool, head: bool, cap: int) -> Floats:
        seconds, lost = choice.seconds(embed, head), losses.runs(choice.number, embed, head)
        allowed = (choice.run_bytes[embed, head] <= cap) & (seconds <= ceiling) & (seconds < INFINITE)
        cost = seconds + multiplier * lost if ceiling == INFINITE else lost
        return numpy.where(allowed, cost, INFINITE)

    return price


def _lowest_ceiling(tables: Tables, losses: Losses, most: float) -> Outcome:
    """By halving the seconds that runs can take."""
    ends = list(itertools.product((False, True), repeat=2))
    choices = [choice for slot in tables.slots for choice in slot.choices]
    every = numpy.unique(numpy.concatenate([choice.seconds(*each).ravel() for choice in choices for each in ends]))
    every = every[every < INFINITE]
    low, high, outcome = 0, len(every) - 1, Outcome()
    while low <= high:
        middle = (low + high) // 2
        found = best_of(tables, weighted(losses, 0.0, float(every[middle])), False, False)
        if found.split is not None and found.value <= most:
            outcome, high = Outcome(float(every[middle]), found.split), middle - 1
        else:
            low = middle + 1
    return outcome


@dataclass(frozen=True)
class _Point:
    """A split with its seconds and its loss."""

    seconds: float
    loss: float
    split: Split

    def cost(self, multiplier: float) -> float:
        return self.seconds + multiplier * self.loss


def _balanced(tables: Tables, losses: Losses, most: float) -> tuple[_Point | None, float]:
    """The quickest split within the limit that is best for some price of loss, and the price that bounds most tightly.

    Two splits, one within the limit and one quicker beyond it, are equally good at one price; what is better there
    replaces one of them, until nothing is.
    """

    def solved(price: Price, with_hops: bool) -> _Point | None:
        split = best_of(tables, price, False, with_hops).split
        return None if split is None else _Point(seconds_of(tables, split), losses.split(split), split)

    good, quick = solved(_loss_alone(losses), False), solved(weighted(losses, 0.0), True)
    if good is None or quick is None or good.loss > most:
        return None, 0.0
    if quick.loss <= most:
        return quick, 0.0
    while True:
        multiplier = max(0.0, (good.seconds - quick.seconds) / (quick.loss - good.loss))
        new = solved(weighted(losses, multiplier), True)
        if new is None or new.cost(multiplier) >= good.cost(multiplier) * (1 - ROUNDING):
            return good, multiplier
        good, quick = (new, quick) if new.loss <= most else (good, new)


def _loss_alone(losses: Losses) -> Price:
    return weighted(losses, 0.0, ceiling=1e300)


@dataclass(frozen=True)
class Label:
    """A way to share out the first layers: seconds, loss, and how it came about."""

    seconds: float
    loss: float
    slot: int
    number: int
    start: int
    stop: int
    before: Label | None


@dataclass(frozen=True)
class _Within:
    """One problem, whose chain is priced with ``multiplier``."""

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
        for choice in self.tables.slots[slot].choices:
            seconds = self._allowed(choice, slot)
            lost = self.losses.runs(choice.number, slot == chain.embed, slot == chain.head)
            for start, found in enumerate(arriving):
                for spent, label in found:
                    total = spent + seconds[start, start + 1 :]
                    loss = lost[start, start + 1 :] + (label.loss if label else 0.0)
                    cost = total + self.multiplier * loss + rest[start + 1 :]
                    limit = (outcome.value + self.multiplier * self.most) * (1 + ROUNDING)
                    useful = (total < outcome.value) & (loss <= self.most) & (cost <= limit)
                    for step in numpy.flatnonzero(useful):
                        stop = start + 1 + int(step)
                        yield Label(float(total[step]), float(loss[step]), slot, choice.number, start, stop, label)

    def _allowed(self, choice: Choice, slot: int) -> Floats:
        chain = self.problem.chain
        embed, head = slot == chain.embed, slot == chain.head
        fits = choice.run_bytes[embed, head] <= self.problem.caps[chain.device[slot]]
        return numpy.where(fits, choice.seconds(embed, head), INFINITE)

    def _finish(self, label: Label, mask: int, outcome: Outcome) -> None:
        """Place the ends that hold no layers, in every format, and enter the best."""
        chain = self.problem.chain
        outside = [slot for slot in {chain.embed, chain.head} if not mask >> chain.device[slot] & 1]
        for choices in itertools.product(*(self.tables.slots[slot].choices for slot in outside)):
            seconds, loss = label.seconds + float(chain.end[label.slot]), label.loss
            for slot, choice in zip(outside, choices, strict=True):
                seconds += float(self._allowed(choice, slot)[0, 0])
                loss += float(self.losses.runs(choice.number, slot == chain.embed, slot == chain.head)[0, 0])
            if loss <= self.most and seconds < outcome.value:
                formats = {chain.device[slot]: choice.number for slot, choice in zip(outside, choices, strict=True)}
                outcome.value, outcome.split = seconds, self._split(label, formats)

    def _split(self, last: Label, formats: dict[int, int]) -> Split:
        chain, runs = self.problem.chain, []
        label: Label | None = last
        while label is not None:
            device = chain.device[label.slot]
            formats[device] = label.number
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
        self._tables = reach_of(backwards, runs_of(backwards), problem.sets)
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
