"""Measured temporary bytes of units, and what follows for steps that were not run. Plain data and straight lines.

A unit's workspace grows with the tokens of a prompt chunk, with their history, and with the rows that decode together.
Knows nothing of devices, formats or how bytes were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitrun.planner.seconds import filled, interpolated


@dataclass(frozen=True)
class RowsPeak:
    """Decoding one token for each of ``rows`` sequences takes ``fixed_bytes + token_bytes * tokens of context``."""

    rows: int
    fixed_bytes: float
    token_bytes: float


@dataclass(frozen=True)
class UnitPeak:
    """Bytes that one unit needs beside weights and KV, at its highest.

    load_bytes     while its weights are read and brought into their format
    chunks         (tokens of a prompt chunk, bytes) without history, tokens ascending
    histories      (tokens of history, bytes) of the longest chunk, from none on, tokens ascending
    decode         one line per number of rows that was run, rows ascending
    """

    load_bytes: int
    chunks: tuple[tuple[int, float], ...]
    histories: tuple[tuple[int, float], ...]
    decode: tuple[RowsPeak, ...]

    def bytes_at(
        self, chunk_tokens: int, sessions: int, context: int, kept: int, lost: float = 0.0, step: int = 1
    ) -> int:
        """At its highest of loading, a chunk at the end of the context, and a token for every session there.

        ``kept`` is how many tokens of the context the unit looks back on; ``lost`` is the share of what a history takes
        that is taken once more, because what earlier chunks gave back is of no use to later ones. ``step``: chunks are
        filled as ``UnitSeconds.chunk_step`` says.
        """
        given = min(chunk_tokens, context)
        history, tokens = min(kept, context - given), filled(given, step)
        behind = (1 + lost) * (interpolated(self.histories, history) - self.histories[0][1])
        chunk = interpolated(self.chunks, tokens) + behind * tokens / self.chunks[-1][0]
        rows = [(line.rows, line.fixed_bytes + line.token_bytes * min(kept, context)) for line in self.decode]
        return round(max(self.load_bytes, chunk, _for_rows(rows, sessions)))


def _for_rows(points: Sequence[tuple[int, float]], rows: int) -> float:
    """On the lines between the points; in proportion where there is one point alone."""
    if len(points) == 1:
        return points[0][1] * max(1.0, rows / points[0][0])
    return interpolated(points, rows)
