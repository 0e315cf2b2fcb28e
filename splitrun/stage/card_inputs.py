"""What a step tells the GPU kernels: ids, lengths, block tables, positions, packed on the host.

Decoding's graphs read it where it was written; a prompt's goes over in one copy. Knows steps and nothing of models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from splitrun.kernels.gpu.products import ROWS
from splitrun.kernels.gpu.shapes import History
from splitrun.kernels.gpu.slots import ARRIVES, LEAVES, SLOTS, deliver, take
from splitrun.schedule.step import IntArray, Step

IN_FLIGHT = 8
"""Copies to the device that may be under way at once."""
FIRST_BLOCKS = 64
"""Blocks of a row that there is room for at first."""


class StagingRing:
    """Pinned memory for small copies to a GPU; a buffer is written again only when its copy is done."""

    def __init__(self, numbers: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._buffers = [torch.zeros(numbers, dtype=torch.int32, pin_memory=pinned) for _ in range(IN_FLIGHT)]
        self._events = [torch.cuda.Event() if pinned else None for _ in range(IN_FLIGHT)]
        self._views: list[IntArray] = [buffer.numpy() for buffer in self._buffers]
        self._next = 0

    def take(self) -> IntArray:
        """The next buffer, to be filled and sent. It holds what was written to it some time ago."""
        event = self._events[self._next]
        if event is not None:
            event.synchronize()
        return self._views[self._next]

    def send(self, count: int, target: Tensor) -> None:
        """Copy the first numbers of the buffer that was taken to a tensor of the device, on the current stream."""
        turn, self._next = self._next, (self._next + 1) % IN_FLIGHT
        event = self._events[turn]
        target[:count].copy_(self._buffers[turn][:count], non_blocking=True)
        if event is not None:
            event.record()


class _SlotView:
    """The numbers of one slot, part by part: views are made once, since making them takes longer than writing."""

    def __init__(self, slot: IntArray, groups: int, blocks: int) -> None:
        self.ids, self.lengths, self.signs = slot[:ROWS], slot[ROWS : 2 * ROWS], slot[-1:]
        self.tables = slot[2 * ROWS : -1].reshape(groups, ROWS, blocks)
        self._rows = ROWS

    def show(self, rows: int) -> None:
        """Mark rows beyond so many as absent; those that are shown get their lengths next."""
        if rows < self._rows:
            self.lengths[rows:] = -1
        self._rows = rows


class DecodeSlots:
    """What decoding takes from a step and gives back, in pinned memory that graphs read and write: a token a row."""

    def __init__(self, groups: Sequence[str], hidden: Tensor, arrives: bool, leaving: Tensor) -> None:
        """``hidden``: the activation on the device, and ``leaving``: what is delivered, Shape: (16, …). ``arrives``:
        whether activations come from elsewhere."""
        self._groups, self._hidden, self._leaving, device = tuple(groups), hidden, leaving, hidden.device
        self._pinned = device.type == "cuda"
        self._turns = torch.zeros(2, dtype=torch.int32, device=device)
        self._next = self._latest = 0  # slots
        self._place = self._left_at = 0  # places of what leaves
        self._leaves = False
        self._done = [torch.cuda.Event() if self._pinned else None for _ in range(SLOTS)]
        self._arriving = self._ring(hidden) if arrives else None
        self._left = self._ring(leaving)
        self._prepared: list[Step | None] = [None] * SLOTS
        self._written = -1  # the step in the slot before the next one
        self._token_rows = torch.arange(ROWS, dtype=torch.int32, device=device)
        self._positions = torch.zeros(ROWS, dtype=torch.int32, device=device)
        self.set_blocks(FIRST_BLOCKS)

    def _ring(self, rows: Tensor) -> Tensor:
        return torch.zeros((SLOTS, *rows.shape), dtype=rows.dtype, pin_memory=self._pinned)

    def set_blocks(self, blocks: int) -> None:
        """Make tables that wide; graphs that read the former ones are of no use any more."""
        count = ROWS * (2 + len(self._groups) * blocks) + 1
        numbers = torch.zeros(count, dtype=torch.int32, device=self._hidden.device)
        slots = torch.zeros((SLOTS, count), dtype=torch.int32, pin_memory=self._pinned)
        self.blocks, self._numbers, self._slots = blocks, numbers, slots  # all of them, or memory was full
        self._forget_prepared()
        self._views = [_SlotView(slot, len(self._groups), blocks) for slot in self._slots.numpy()]
        self.ids, self.lengths = self._numbers[:ROWS], self._numbers[ROWS : 2 * ROWS]

    def prepare(self, step: Step) -> None:
        """Fill a slot with all that is known of a step that is expected, one token a row: `write` then adds its ids or
        its activation. It is the next slot's or, when the step before it has not come, that behind it; nothing is done
        where that one is still read."""
        ahead = step.index - self._written
        turn = (self._next + ahead - 1) % SLOTS
        event = self._done[turn]
        if ahead not in (1, 2) or (event is not None and not event.query()):
            return
        self._prepared[turn] = None
        self._fill(turn, step, range(step.rows), 0)
        self._prepared[turn] = step

    def write(self, step: Step, rows: Sequence[int], incoming: Tensor | None, offset: int = 0, *, leaves: bool) -> None:
        """Fill the next slot with rows of a step, each with its new token at ``offset``; rows beyond them are marked as
        absent. ``incoming``: their activation, here or on the device. ``leaves``: what comes out is delivered."""
        ready, self._prepared[self._next] = self._prepared[self._next], None
        if ready is not step:
            self._wait_for(self._next)
            self._fill(self._next, step, rows, offset)
        self._written, self._leaves = step.index, leaves
        view, count = self._views[self._next], len(rows)
        if self._arriving is None:
            ids = step.token_ids
            view.ids[:count] = ids if count == len(ids) else ids[step.query_starts[numpy.asarray(rows)] + offset]
        here = incoming is not None and incoming.device.type == "cpu"
        view.signs[0] = here * ARRIVES + leaves * LEAVES
        if incoming is None:
            return
        slot = None if self._arriving is None else self._arriving[self._next]
        alike = slot is not None and (incoming.dtype, incoming.shape[1:]) == (slot.dtype, slot.shape[1:])
        if here and slot is not None and alike and incoming.is_contiguous():
            ctypes.memmove(slot.data_ptr(), incoming.data_ptr(), incoming.nbytes)  # a third of what torch's copy takes
        else:
            (slot if here and slot is not None else self._hidden)[:count].copy_(incoming, non_blocking=True)

    def _fill(self, turn: int, step: Step, rows: Sequence[int], offset: int) -> None:
        """Lengths and block tables of rows of a step, into a slot that nobody reads."""
        view, count, lengths = self._views[turn], len(rows), step.context_lengths
        whole = count == len(step.token_ids)  # every row with its one token
        picked = None if whole else numpy.asarray(rows, dtype=numpy.int32)
        view.show(count)
        view.lengths[:count] = lengths if picked is None else lengths[picked] + offset
        for cells, group in zip(view.tables, self._groups, strict=True):
            table = step.block_tables[group]
            cells[:count, : table.shape[1]] = table if picked is None else table[picked]

    def write_absent(self) -> None:
        """Fill the next slot with no row at all: a first run must not write into anybody's blocks."""
        self._wait_for(self._next)
        self._prepared[self._next] = None
        view = self._views[self._next]
        view.show(0)
        view.signs[0] = 0

    def take(self, rows: int) -> None:
        """The first launch of a run of that many rows."""
        take(self._slots, self._arriving, self._turns, self._numbers, self._hidden, rows, len(self._groups))

    def deliver(self, rows: int) -> None:
        """The last launch of a run of that many rows."""
        deliver(self._leaving[:rows], self._left, self._turns, self._numbers)

    def launched(self, stream: torch.cuda.Stream | None) -> None:
        """A run was launched on a stream: the next slot's turn comes, and place's where it leaves something."""
        self._latest, self._next = self._next, (self._next + 1) % SLOTS
        if self._leaves:
            self._left_at, self._place = self._place, (self._place + 1) % SLOTS
        event = self._done[self._latest]
        if event is not None:
            event.record(stream)  # torch takes as long to look up the current one

    def recount(self) -> None:
        """Ask the device whose turn it is: a launch may have failed half way."""
        self._next, self._place = self._turns.tolist()
        self._forget_prepared()

    def left(self, rows: int) -> Tensor:
        """What the latest run that leaves something delivers, once it is done. Shape: (rows, …); written anew after
        SLOTS such runs."""
        return self._left[self._left_at, :rows]

    @property
    def done(self) -> torch.cuda.Event | None:
        """Behind the latest run; None where work is done when it is launched."""
        return self._done[self._latest]

    def wait(self) -> None:
        """Wait until the latest run is done."""
        if self.done is not None:
            self.done.synchronize()

    def _wait_for(self, turn: int) -> None:
        """Until the run that read a slot last is done."""
        event = self._done[turn]
        if event is not None:
            event.synchronize()

    def _forget_prepared(self) -> None:
        self._prepared = [None] * SLOTS

    def history(self, group: str, rows: int) -> History:
        """Where the first rows' tokens stand, for the layers of a KV group."""
        start = 2 * ROWS + self._groups.index(group) * ROWS * self.blocks
        table = self._numbers[start : start + ROWS * self.blocks].view(ROWS, self.blocks)
        return History(self.lengths[:rows], table[:rows], self._positions[:rows], self._token_rows, self._token_rows)


class PromptInputs:
    """The memory that prompt kernels and graphs read a step from: tokens side by side, of up to 16 rows."""

    def __init__(self, groups: Sequence[str], device: torch.device) -> None:
        self._groups, self._where = tuple(groups), device
        self._tokens = self._blocks = 0

    def make_room(self, step: Step, tokens: int) -> bool:
        """Make the memory large enough for that many tokens and the step's tables. Whether it has moved."""
        widest = max((table.shape[1] for table in step.block_tables.values()), default=1)
        if tokens <= self._tokens and widest <= self._blocks:
            return False
        most, blocks = max(tokens, self._tokens), max(self._blocks, 1 << (widest - 1).bit_length())
        numbers = 3 * most + 2 * ROWS + 1 + len(self._groups) * ROWS * blocks
        device, ring = torch.zeros(numbers, dtype=torch.int32, device=self._where), StagingRing(numbers, self._where)
        self._tokens, self._blocks, self._device, self._ring = most, blocks, device, ring  # all, or memory was full
        sizes = [self._tokens] * 3 + [ROWS + 1, ROWS] + [ROWS * self._blocks] * len(self._groups)
        self._starts = numpy.cumsum([0, *sizes]).tolist()
        parts = self._device.split(sizes)
        self.ids, self.positions, self._token_rows, self._begins, self._lengths = parts[:5]
        self._tables = {
            group: part.view(ROWS, self._blocks) for group, part in zip(self._groups, parts[5:], strict=True)
        }
        return True

    def clear(self) -> None:
        """Hold no token: launches then write nothing."""
        self._device.zero_()
        self.positions.fill_(-1)

    def write(self, step: Step, rows: Sequence[int]) -> None:
        """Take up all tokens of some rows of a step."""
        host, picked, count = self._ring.take(), numpy.asarray(rows), len(rows)
        counts, lengths = step.counts[picked], step.context_lengths[picked]
        starts = numpy.zeros(ROWS + 1, dtype=numpy.int32)
        numpy.cumsum(counts, out=starts[1 : count + 1])
        starts[count + 1 :] = starts[count]
        tokens = int(starts[count])
        owners = numpy.repeat(numpy.arange(count, dtype=numpy.int32), counts)
        within = numpy.arange(tokens, dtype=numpy.int32) - starts[owners]
        places = self._starts
        host[:tokens] = step.token_ids[step.query_starts[picked][owners] + within]
        host[places[1] : places[2]] = -1
        host[places[1] : places[1] + tokens] = lengths[owners] + within
        host[places[2] : places[2] + tokens] = owners
        host[places[3] : places[4]] = starts
        host[places[4] : places[4] + count] = lengths
        for group, start in zip(self._groups, places[5:], strict=False):
            table = step.block_tables[group][picked]
            cells = host[start : start + ROWS * self._blocks].reshape(ROWS, self._blocks)
            cells[:count, : table.shape[1]] = table
        self._ring.send(len(host), self._device)

    def history(self, group: str, tokens: int, rows: int) -> History:
        """Where the tokens stand, for the layers of a KV group."""
        return History(
            lengths=self._lengths[:rows],
            tables=self._tables[group][:rows],
            positions=self.positions[:tokens],
            token_rows=self._token_rows[:tokens],
            starts=self._begins[: rows + 1],
            longest=tokens,
        )
