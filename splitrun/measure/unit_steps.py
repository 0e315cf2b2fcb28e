"""Hand-made steps for timing a stage of a few units: what the scheduler would send, without any request.

Knows positions and blocks; knows nothing of clocks, models' names or plans.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy

from splitrun.planner.facts import KVGroup
from splitrun.schedule.request import SamplingParams
from splitrun.schedule.step import RowSampling, Step


@dataclass(frozen=True)
class Point:
    """One kind of step: ``rows`` sequences, each with ``tokens`` new tokens behind ``context`` others."""

    rows: int
    tokens: int
    context: int

    @property
    def name(self) -> str:
        """For the cache."""
        return f"{self.rows}x{self.tokens} behind {self.context}"


def pool_blocks(points: Iterable[Point], block_tokens: int) -> int:
    """Blocks that the largest of the steps needs."""
    return max(point.rows * _row_blocks(point, block_tokens) for point in points)


def make_step(point: Point, groups: Iterable[KVGroup], block_tokens: int, blocks: int) -> Step:
    """The step of a point, over a pool of ``blocks`` blocks; rows share blocks where the pool is smaller than asked.

    Every row asks for its next token, greedily, as a decoding row and the last chunk of a prompt do.
    """
    each = _row_blocks(point, block_tokens)
    table = (numpy.arange(point.rows * each, dtype=numpy.int32) % blocks).reshape(point.rows, each)
    greedy = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    return Step(
        index=0,
        epoch=0,
        token_ids=numpy.ones(point.rows * point.tokens, dtype=numpy.int32),
        query_starts=numpy.arange(point.rows + 1, dtype=numpy.int32) * point.tokens,
        context_lengths=numpy.full(point.rows, point.context, dtype=numpy.int32),
        slots=numpy.arange(point.rows, dtype=numpy.int32),
        block_tables={group.name: table for group in groups if group.kind != "state"},
        sampling=tuple(RowSampling(greedy, 0, point.context + point.tokens) for _ in range(point.rows)),
        prompt_logprobs=(None,) * point.rows,
        replay=(False,) * point.rows,
    )


def _row_blocks(point: Point, block_tokens: int) -> int:
    return -(-(point.context + point.tokens) // block_tokens)
