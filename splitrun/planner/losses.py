"""What runs of layers lose in precision, and prices that put loss beside seconds.

Losses add up over units (``quality.py``). Knows numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from splitrun.planner.facts import FORMATS, ModelProfile
from splitrun.planner.problem import INFINITE, Choice, Floats, Split, Tables
from splitrun.planner.quality import unit_loss
from splitrun.planner.search import Price


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


def weighted(losses: Losses, multiplier: float, ceiling: float = INFINITE) -> Price:
    """Seconds and ``multiplier`` times the loss, of runs that keep the cap; under a ceiling, loss alone."""

    def price(choice: Choice, embed: bool, head: bool, cap: int) -> Floats:
        seconds, lost = choice.seconds(embed, head), losses.runs(choice.number, embed, head)
        allowed = (choice.run_bytes[embed, head] <= cap) & (seconds <= ceiling) & (seconds < INFINITE)
        cost = seconds + multiplier * lost if ceiling == INFINITE else lost
        return numpy.where(allowed, cost, INFINITE)

    return price
