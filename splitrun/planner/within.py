"""The fastest split within a limit on lost precision: as ``search.py``, with losses beside seconds.

Instead of one best value for each place in the chain it keeps every pair of (seconds, loss) that no other pair beats
in both, so the answer is exact. It takes longer, and is asked only when the fastest split of all loses too much.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy

from splitrun.planner.alike import DeviceSet, apart, classes_of, ends_of, sets_of
from splitrun.planner.facts import FORMATS, ModelProfile
from splitrun.planner.problem import INFINITE, Choice, Floats, Integers, Split, Tables
from splitrun.planner.quality import unit_loss
from splitrun.planner.search import Outcome, divisions


@dataclass(frozen=True)
class Label:
    """A way to share out the first layers: seconds (or those of the busiest device), loss, and how it came about."""

    seconds: float
    loss: float
    slot: int
    number: int
    start: int
    stop: int
    before: Label | None


@dataclass(frozen=True)
class _Losses:
    """Loss of the ends and, summed up, of the layers, per format number."""

    embed: dict[int, float]
    head: dict[int, float]
    ahead: dict[int, Floats]

    @classmethod
    def of(cls, profile: ModelProfile, numbers: set[int]) -> _Losses:
        def each(number: int) -> list[float]:
            return [unit_loss(profile, unit, FORMATS[number]) for unit in range(len(profile.units))]

        found = {number: each(number) for number in numbers}
        return cls(
            {number: values[0] for number, values in found.items()},
            {number: values[-1] for number, values in found.items()},
            {number: numpy.concatenate([[0.0], numpy.cumsum(values[1:-1])]) for number, values in found.items()},
        )

    def run(self, number: int, embed: bool, head: bool, start: int, stop: int) -> float:
        ends = self.embed[number] * embed + self.head[number] * head
        return ends + float(self.ahead[number][stop] - self.ahead[number][start])


def fastest_within(tables: Tables, profile: ModelProfile, bottleneck: bool, most: float) -> Outcome:
    """The split of least seconds (on its busiest device) whose loss is at most ``most``; no split when none fits."""
    numbers = {choice.number for slot in tables.slots for choice in slot.choices}
    losses, outcome = _Losses.of(profile, numbers), Outcome()
    device, classes = [slot.device for slot in tables.slots], classes_of(tables)
    pairs = ends_of(classes)
    for embed, head in itertools.product(range(len(tables.slots)), repeat=2):
        if (device[embed] == device[head] and embed != head) or (device[embed], device[head]) not in pairs:
            continue
        sets = sets_of(apart(classes, {device[embed], device[head]}))
        for caps in divisions(tables, device[embed], device[head]):
            _Within(tables, losses, embed, head, caps, bottleneck, most).improve(sets, outcome)
    return outcome


@dataclass(frozen=True)
class _Within:
    """One problem: embed and head placed, shared memories divided."""

    tables: Tables
    losses: _Losses
    embed: int
    head: int
    caps: Integers
    bottleneck: bool
    most: float

    def improve(self, sets: Sequence[DeviceSet], outcome: Outcome) -> None:
        """Enter what is found in chains of those sets of devices into ``outcome``."""
        tables, layers = self.tables, self.tables.layers
        device = [slot.device for slot in tables.slots]
        reach: dict[tuple[int, int], list[list[Label]]] = {}
        for mask, last in sets:
            for slot in range(len(tables.slots)):
                taken = device[slot] in (device[self.embed], device[self.head])
                if device[slot] not in last or (taken and slot not in (self.embed, self.head)):
                    continue
                front: list[list[Label]] = [[] for _ in range(layers + 1)]
                for label in self._extended(reach, mask, slot, device, outcome):
                    front[label.stop].append(label)
                reach[mask, slot] = [undominated(labels) for labels in front]
                for label in reach[mask, slot][layers]:
                    self._finish(label, mask, device, outcome)

    def _extended(
        self,
        reach: dict[tuple[int, int], list[list[Label]]],
        mask: int,
        slot: int,
        device: Sequence[int],
        outcome: Outcome,
    ) -> Iterator[Label]:
        """Every run of the slot behind every label of the others, and from the first layer."""
        tables, before = self.tables, mask ^ (1 << device[slot])
        with_hops = not self.bottleneck
        arriving: list[list[tuple[float, Label | None]]] = [[] for _ in range(tables.layers + 1)]
        if before == 0:
            start = float(tables.enter_s[self.embed] + tables.hop_s[self.embed, slot]) if with_hops else 0.0
            arriving[0] = [(start, None)]
        for other in range(len(tables.slots)):
            hop = float(tables.hop_s[other, slot]) if with_hops else 0.0
            for place, labels in enumerate(reach.get((before, other), ())):
                arriving[place] += [(label.seconds + hop, label) for label in labels]
        for choice in tables.slots[slot].choices:
            seconds = self._allowed(choice, slot, device[slot])
            for start_layer, stop in zip(*numpy.nonzero(seconds < INFINITE), strict=True):
                if start_layer == stop:
                    continue
                cost = float(seconds[start_layer, stop])
                loss = self.losses.run(choice.number, slot == self.embed, slot == self.head, start_layer, stop)
                for spent, label in arriving[start_layer]:
                    total = max(spent, cost) if self.bottleneck else spent + cost
                    lost = loss + (label.loss if label else 0.0)
                    if total < outcome.value and lost <= self.most:
                        yield Label(total, lost, slot, choice.number, int(start_layer), int(stop), label)

    def _allowed(self, choice: Choice, slot: int, device: int) -> Floats:
        embed, head = slot == self.embed, slot == self.head
        seconds = choice.seconds(embed, head)
        return numpy.where(choice.run_bytes[embed, head] <= self.caps[device], seconds, INFINITE)

    def _finish(self, label: Label, mask: int, device: Sequence[int], outcome: Outcome) -> None:
        """Place the ends that hold no layers, in every format, and enter the best."""
        tables = self.tables
        outside = [slot for slot in {self.embed, self.head} if not mask >> device[slot] & 1]
        used = mask | 1 << device[self.embed] | 1 << device[self.head]
        hops = 0.0 if self.bottleneck else float(tables.hop_s[label.slot, self.head] + tables.leave_s[self.head])
        for choices in itertools.product(*(tables.slots[slot].choices for slot in outside)):
            seconds, loss = label.seconds + hops, label.loss
            for slot, choice in zip(outside, choices, strict=True):
                cost = float(self._allowed(choice, slot, device[slot])[0, 0])
                seconds = max(seconds, cost) if self.bottleneck else seconds + cost
                loss += self.losses.run(choice.number, slot == self.embed, slot == self.head, 0, 0)
            if loss > self.most or seconds == INFINITE:
                continue
            outcome.by_devices[used] = min(outcome.by_devices.get(used, INFINITE), seconds)
            if seconds < outcome.value:
                formats = {device[slot]: choice.number for slot, choice in zip(outside, choices, strict=True)}
                outcome.value, outcome.split = seconds, self._split(label, formats, device)

    def _split(self, last: Label, formats: dict[int, int], device: Sequence[int]) -> Split:
        runs: list[tuple[int, int, int]] = []
        label: Label | None = last
        while label is not None:
            formats[device[label.slot]] = label.number
            runs.append((device[label.slot], label.start, label.stop))
            label = label.before
        return Split(device[self.embed], device[self.head], tuple(reversed(runs)), formats)


def undominated(labels: Sequence[Label]) -> list[Label]:
    """Those that no other beats in seconds and loss at once."""
    kept: list[Label] = []
    for label in sorted(labels, key=lambda each: (each.seconds, each.loss)):
        if not kept or label.loss < kept[-1].loss:
            kept.append(label)
    return kept
