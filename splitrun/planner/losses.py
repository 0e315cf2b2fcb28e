"""What runs of layers lose in precision, and prices that put loss beside seconds.

Losses add up over units (``quality.py``). Knows numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from splitrun.planner.facts import FORMATS, ModelProfile
from splitrun.planner.problem import INFINITE, Choice, Ends, Floats, Formats, Split, Tables
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
        choices = (choice for slot in tables.slots for found in slot.choices.values() for choice in found)
        numbers = {number for choice in choices for number in choice.formats}
        units = range(len(profile.units))
        found = {number: [unit_loss(profile, unit, FORMATS[number]) for unit in units] for number in numbers}
        return cls(
            {number: values[0] for number, values in found.items()},
            {number: values[-1] for number, values in found.items()},
            {number: numpy.concatenate([[0.0], numpy.cumsum(values[1:-1])]) for number, values in found.items()},
        )

    def runs(self, ends: Ends, formats: Formats) -> Floats:
        """What a device with those ends in those formats loses with each run of layers. Shape: (n + 1, n + 1)."""
        lost = self.embed[formats[0]] * ends[0] + self.head[formats[2]] * ends[1]
        return lost + self.ahead[formats[1]][None, :] - self.ahead[formats[1]][:, None]

    def split(self, split: Split) -> float:
        """What a whole split loses."""
        return sum(
            float(self.runs(split.ends(device), split.formats[device])[run]) for device, run in split.bounds.items()
        )


def weighted(losses: Losses, multiplier: float, ceiling: float = INFINITE) -> Price:
    """Seconds and ``multiplier`` times the loss, of runs that keep the cap; under a ceiling, loss alone."""

    def price(choice: Choice, cap: int) -> Floats:
        seconds, lost = choice.seconds, losses.runs(choice.ends, choice.formats)
        allowed = (choice.bytes <= cap) & (seconds <= ceiling) & (seconds < INFINITE)
        cost = seconds + multiplier * lost if ceiling == INFINITE else lost
        return numpy.where(allowed, cost, INFINITE)

    return price
