"""What comes back from the stages: tokens of a step, its failure, or news of lost stages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from splitrun.errors import SplitrunError
from splitrun.schedule.step import Tokens


@dataclass(frozen=True)
class Failure:
    """A step that a stage could not finish."""

    step: int
    epoch: int
    error: SplitrunError


@dataclass(frozen=True)
class Interruption:
    """Stages were lost with their KV. Nothing can run until ``Resumed``, which a ``final`` interruption never gets."""

    error: SplitrunError
    final: bool = False


@dataclass(frozen=True)
class Restarted:
    """All stages are there again. `Pipeline.restore` fills those that have lost their KV, and then comes `Resumed`.
    ``loss``: which loss they come back from."""

    loss: int


@dataclass(frozen=True)
class Resumed:
    """Steps can run again. ``ends``: request -> how many of its first tokens every stage has KV of. ``refill``: the
    stages that compute what is behind; empty: all."""

    ends: Mapping[int, int] = field(default_factory=dict)
    refill: Collection[int] = ()


Outcome = Tokens | Failure | Interruption | Restarted | Resumed
