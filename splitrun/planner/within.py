"""The fastest split within a limit on lost precision: as ``search.py``, with losses beside seconds.

For the busiest device: the least loss under a ceiling on every device's seconds, and the lowest ceiling whose loss is
within the limit. For a sum of seconds: a price for loss that balances seconds and loss gives a plan and a bound
(Lagrange); splits that the bound does not rule out are gone through, with every pair of (seconds, loss) that no other
beats in both. Both are exact. It takes longer, and is asked only when the fastest split of all loses too much.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy

from splitrun.planner.facts import ModelProfile
from splitrun.planner.labels import ROUNDING, Labels
from splitrun.planner.losses import Losses, weighted
from splitrun.planner.problem import INFINITE, Split, Tables, seconds_of
from splitrun.planner.search import Outcome, Price, best_of, problems

CLOSE = 1e-9
"""Limits are stretched by as much, so that a plan may lie on one."""


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
        Labels(tables, losses, problem, multiplier, most).improve(outcome)
    return replace(outcome, by_devices={})


def _lowest_ceiling(tables: Tables, losses: Losses, most: float) -> Outcome:
    """By halving the seconds that runs can take."""
    choices = (choice for slot in tables.slots for found in slot.choices.values() for choice in found)
    every = numpy.unique(numpy.concatenate([choice.seconds.ravel() for choice in choices]))
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
