"""What goes into a decoding graph and comes out of it, through pinned memory that kernels themselves read and write.

A copy is a call of its own for the host; a kernel that reads the host's memory is one more node of a graph that is
launched anyway. The memory is a ring of slots, one for each run in flight, and a ring of places for what leaves; the
device counts whose turn it is in both. Knows numbers and rows, nothing of steps.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

SLOTS = 8
"""Runs that may be in flight at once, and places for what leaves."""
ARRIVES, LEAVES = 1, 2
"""A slot's last number: whether an activation lies in it, and whether what comes out is delivered."""


@triton.jit
def _take(
    slots,
    arriving,
    turn,
    numbers,
    hidden,
    length,
    blocks,
    groups,
    columns,
    ROWS: tl.constexpr,
    ARRIVES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One row out of the slot whose turn it is: its id, its length, its block tables, its activation; and the slot's
    last number."""
    row = tl.program_id(0)
    slot = tl.load(turn).to(tl.int64)
    source = slots + slot * length
    lane = tl.arange(0, WIDE)
    tl.store(numbers + row, tl.load(source + row))
    tl.store(numbers + ROWS + row, tl.load(source + ROWS + row))
    for group in range(groups):
        start = 2 * ROWS + (group * ROWS + row) * blocks
        for first in range(0, blocks, WIDE):
            inside = first + lane < blocks
            table = tl.load(source + start + first + lane, mask=inside, other=0)
            tl.store(numbers + start + first + lane, table, mask=inside)
    signs = tl.load(source + length - 1)
    tl.store(numbers + length - 1, signs, mask=row == 0)
    if ARRIVES:
        arrived = signs & 1
        if arrived != 0:
            for first in range(0, columns, WIDE):
                inside = first + lane < columns
                values = tl.load(arriving + (slot * ROWS + row) * columns + first + lane, mask=inside, other=0.0)
                tl.store(hidden + row.to(tl.int64) * columns + first + lane, values, mask=inside)


def take(
    slots: Tensor, arriving: Tensor | None, turns: Tensor, numbers: Tensor, hidden: Tensor, rows: int, groups: int
) -> None:
    """Bring the first rows of the slot whose turn it is to the device.

    slots     int32, pinned, Shape: (SLOTS, length): ids, lengths, and block tables group by group, each for all rows of
              ``hidden``; the last number is ARRIVES, LEAVES, both or 0
    arriving  pinned, Shape: (SLOTS, most rows, columns); None where the range embeds
    turns     int32, whose turn it is among slots and among places. Shape: (2,)
    numbers   int32, the same as in a slot. Shape: (length,)
    hidden    Shape: (most rows, columns)
    """
    most, columns = hidden.shape
    _take[(rows,)](
        slots,
        hidden if arriving is None else arriving,
        turns,
        numbers,
        hidden,
        slots.shape[1],
        (numbers.shape[0] // most - 2) // max(groups, 1),
        groups,
        columns,
        ROWS=most,
        ARRIVES=arriving is not None,
        WIDE=1024,
        num_warps=4,
    )


@triton.jit
def _deliver(values, leaving, turns, sign, size, count, SLOTS: tl.constexpr, WIDE: tl.constexpr):
    """All values into the place whose turn it is, if they leave; then it is the next slot's turn, and place's."""
    slot, place = tl.load(turns), tl.load(turns + 1)
    leaves = (tl.load(sign) & 2) // 2
    if leaves != 0:
        target = leaving + place.to(tl.int64) * size
        lane = tl.arange(0, WIDE)
        for first in range(0, count, WIDE):
            inside = first + lane < count
            tl.store(target + first + lane, tl.load(values + first + lane, mask=inside, other=0), mask=inside)
    tl.debug_barrier()  # every thread has read whose turn it is
    tl.store(turns, (slot + 1) % SLOTS)
    tl.store(turns + 1, (place + leaves) % SLOTS)


def deliver(values: Tensor, leaving: Tensor, turns: Tensor, numbers: Tensor) -> None:
    """Put rows of a device into the place whose turn it is, where the slot that was taken says so; pass the turns on.

    Shape: values (rows, …), contiguous; leaving, pinned, (SLOTS, most rows, …) of the same type; turns and numbers as
    for `take`.
    """
    _deliver[(1,)](
        values, leaving, turns, numbers[-1:], leaving[0].numel(), values.numel(),
        SLOTS=leaving.shape[0], WIDE=2048, num_warps=8,
    )  # fmt: skip
