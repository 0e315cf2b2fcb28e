"""Measured seconds of units, and what follows for steps that were not measured. Plain data and straight lines.

A decoded token costs ``a + b * context`` for each number of rows that was measured; other row counts and chunk lengths
lie on the line between their neighbours. Knows nothing of devices, formats or how seconds were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

DOUBLING, FEWEST_DOUBLED = 0, 32
"""As ``chunk_step``: chunks of a prompt are filled to a power of two, from so many tokens on."""


@dataclass(frozen=True)
class DecodeLine:
    """One token for each of ``rows`` sequences takes ``fixed_s + per_token_s * tokens of context``."""

    rows: int
    fixed_s: float
    per_token_s: float

    def at(self, history: float) -> float:
        """Seconds with that many tokens of context in every row."""
        return self.fixed_s + self.per_token_s * history


@dataclass(frozen=True)
class UnitSeconds:
    """What one unit takes on one device in one format.

    decode           one line per number of rows that was measured, rows ascending
    prefill          (tokens of a prompt chunk, seconds) without history, tokens ascending
    chunk_history_s  further seconds per token of the chunk and token of its history
    chunk_step       a chunk takes as long as one of the next multiple of so many tokens; or DOUBLING
    spread           half the width of the middle half of the runs, as a share of their median
    """

    decode: tuple[DecodeLine, ...]
    prefill: tuple[tuple[int, float], ...]
    chunk_history_s: float = 0.0
    spread: float = 0.0
    chunk_step: int = 1

    def decode_s(self, rows: int, history: float) -> float:
        """Seconds of one token for each of ``rows`` rows with that much context each."""
        return interpolated([(line.rows, line.at(history)) for line in self.decode], rows)

    def prefill_s(self, tokens: float, history: float = 0.0) -> float:
        """Seconds of a prompt chunk of that length behind that much history."""
        points = [(1, self.decode[0].fixed_s), *self.prefill] if self.decode[0].rows == 1 else [*self.prefill]
        return interpolated(points, filled(tokens, self.chunk_step)) + self.chunk_history_s * tokens * history


@dataclass(frozen=True)
class DeviceSeconds:
    """Everything measured for one device and one weight format.

    ``stage`` is what each stage takes whatever its units: ids, positions, masks, rotary tables. ``units`` follow the
    model's units; a unit's own seconds come on top of its stage's.
    """

    stage: UnitSeconds
    units: tuple[UnitSeconds, ...]


def filled(tokens: float, step: int) -> float:
    """How many tokens are computed for a chunk of ``tokens``: see ``chunk_step``. One token is no chunk."""
    if tokens <= 1 or step == 1:
        return tokens
    return doubled(ceil(tokens)) if step == DOUBLING else ceil(tokens / step) * step


def doubled(tokens: int) -> int:
    """The power of two that so many tokens are filled to."""
    return max(FEWEST_DOUBLED, 1 << (tokens - 1).bit_length())


def interpolated(points: Sequence[tuple[float, float]], position: float) -> float:
    """The value at ``position`` on the lines between ``points``; beyond the last along the last line.

    Before the first point, and with a single one, the value is that point's: a smaller step takes no longer.
    """
    if len(points) == 1 or position <= points[0][0]:
        return points[0][1]
    upper = next((index for index, point in enumerate(points) if point[0] >= position), len(points) - 1)
    (x0, y0), (x1, y1) = points[upper - 1], points[upper]
    return max(0.0, y0 + (y1 - y0) * (position - x0) / (x1 - x0))
