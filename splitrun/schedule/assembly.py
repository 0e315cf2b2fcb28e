"""Write the chosen slices down as the arrays of a Step. Chooses nothing itself."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import accumulate

import numpy

from splitrun.schedule.accounts import BlockAccounts
from splitrun.schedule.blocks import ABSENT
from splitrun.schedule.sequence import Sequence, Slice
from splitrun.schedule.step import IntArray, Step

Row = tuple[Sequence, Slice]


def build_step(
    index: int,
    epoch: int,
    rows: Rows[Row],
    accounts: BlockAccounts,
    refill: tuple[int, ...] = (),
    tokens: bool = True,
) -> Step:
    """The step that runs ``rows`` in this order. Every sequence has its slot and the blocks its slice needs. Without
    ``tokens``, which are not known yet, there are zeros in their place."""
    starts = [0, *accumulate(slice_.count for _, slice_ in rows)]
    targets = [sequence.prompt_targets(slice_) for sequence, slice_ in rows]
    return Step(
        index=index,
        epoch=epoch,
        token_ids=numpy.array(
            [token for sequence, slice_ in rows for token in sequence.tokens(slice_)] if tokens else [0] * starts[-1],
            dtype=numpy.int32,
        ),
        query_starts=numpy.array(starts, dtype=numpy.int32),
        context_lengths=numpy.array([slice_.start for _, slice_ in rows], dtype=numpy.int32),
        slots=numpy.array([sequence.slot for sequence, _ in rows], dtype=numpy.int32),
        block_tables={group.name: _block_tables(group.name, rows, accounts) for group in accounts.groups},
        sampling=tuple(sequence.sampling(slice_) for sequence, slice_ in rows),
        prompt_logprobs=tuple(
            None if wanted is None else sequence.request.sampling.prompt_logprobs
            for (sequence, _), wanted in zip(rows, targets, strict=True)
        ),
        prompt_targets={row: wanted for row, wanted in enumerate(targets) if wanted is not None} or None,
        replay=tuple(slice_.kind == "replay" for _, slice_ in rows),
        requests=tuple(sequence.request.request_id for sequence, _ in rows),
        refill=refill,
    )


def _block_tables(group: str, rows: Rows[Row], accounts: BlockAccounts) -> IntArray:
    """The rows' tables of one group, padded to the widest. Shape: (rows, blocks)."""
    tables = [accounts.tables(sequence)[group].ids for sequence, _ in rows]
    widest = max(map(len, tables))
    if all(len(ids) == widest for ids in tables):
        return numpy.array(tables, dtype=numpy.int32)
    array = numpy.full((len(rows), widest), ABSENT, dtype=numpy.int32)
    for row, ids in enumerate(tables):
        array[row, : len(ids)] = ids
    return array
