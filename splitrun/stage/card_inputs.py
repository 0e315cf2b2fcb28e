"""What a step tells the GPU kernels, packed into one copy: ids, lengths, block tables, positions.

Index arithmetic on the host and one transfer; knows steps and nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from splitrun.kernels.gpu.products import ROWS
from splitrun.kernels.gpu.shapes import History
from splitrun.schedule.step import IntArray, Step

IN_FLIGHT = 8
"""Copies to the device that may be under way at once."""


class StagingRing:
    """Pinned memory for small copies to a GPU; a buffer is written again only when its copy is done."""

    def __init__(self, numbers: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._buffers = [torch.zeros(numbers, dtype=torch.int32, pin_memory=pinned) for _ in range(IN_FLIGHT)]
        self._events = [torch.cuda.Event() if pinned else None for _ in range(IN_FLIGHT)]
        self._views: list[IntArray] = [buffer.numpy() for buffer in self._buffers]
        self._next = 0

    def send(self, numbers: IntArray, target: Tensor) -> None:
        """Copy int32 numbers to the beginning of a tensor of the device, on the current stream."""
        turn, self._next = self._next, (self._next + 1) % IN_FLIGHT
        event, count = self._events[turn], len(numbers)
        if event is not None:
            event.synchronize()
        self._views[turn][:count] = numbers
        target[:count].copy_(self._buffers[turn][:count], non_blocking=True)
        if event is not None:
            event.record()


class DecodeInputs:
    """The memory that decoding kernels and graphs read a step from: 16 rows of one token each."""

    def __init__(self, groups: Sequence[str], blocks: int, device: torch.device) -> None:
        self._groups = tuple(groups)
        self.blocks = blocks
        numbers = ROWS * (2 + len(self._groups) * blocks)
        self._device = torch.zeros(numbers, dtype=torch.int32, device=device)
        self._host = numpy.zeros(numbers, dtype=numpy.int32)
        self._ring = StagingRing(numbers, device)
        self.ids, self.lengths = self._device[:ROWS], self._device[ROWS : 2 * ROWS]
        self.lengths.fill_(-1)
        self._token_rows = torch.arange(ROWS, dtype=torch.int32, device=device)
        self.positions = torch.zeros(ROWS, dtype=torch.int32, device=device)

    def write(self, step: Step, rows: Sequence[int], offset: int = 0) -> None:
        """Take up rows of a step, each with its new token at ``offset``; rows beyond them are marked as absent."""
        host, count, blocks = self._host, len(rows), self.blocks
        picked = numpy.asarray(rows)
        host[:count] = step.token_ids[step.query_starts[picked] + offset]
        host[ROWS : 2 * ROWS] = -1
        host[ROWS : ROWS + count] = step.context_lengths[picked] + offset
        end = 2 * ROWS
        for place, group in enumerate(self._groups):
            table = step.block_tables[group][picked]
            width = table.shape[1]
            start = 2 * ROWS + place * ROWS * blocks
            cells = host[start : start + ROWS * blocks].reshape(ROWS, blocks)
            cells[:count, :width] = table[:, :width]
            end = start + count * blocks
        self._ring.send(host[:end], self._device)

    def history(self, group: str, rows: int) -> History:
        """Where the first rows' tokens stand, for the layers of a KV group."""
        start = 2 * ROWS + self._groups.index(group) * ROWS * self.blocks
        table = self._device[start : start + ROWS * self.blocks].view(ROWS, self.blocks)
        return History(self.lengths[:rows], table[:rows], self.positions[:rows], self._token_rows, self._token_rows)


@dataclass(frozen=True)
class PromptInputs:
    """The tokens of some rows of a step, side by side.

    tokens  where they lie in the step's packed tensors. Shape: (tokens,)
    """

    ids: Tensor
    tokens: Tensor
    whole: bool
    positions: Tensor
    histories: dict[str, History]

    @classmethod
    def of(cls, step: Step, rows: Sequence[int], groups: Sequence[str], device: torch.device) -> PromptInputs:
        """Those rows of a step, in one copy to the device."""
        picked = numpy.asarray(rows)
        counts, lengths = step.counts[picked], step.context_lengths[picked]
        starts = numpy.zeros(len(rows) + 1, dtype=numpy.int32)
        numpy.cumsum(counts, out=starts[1:])
        token_rows = numpy.repeat(numpy.arange(len(rows), dtype=numpy.int32), counts)
        within = numpy.arange(starts[-1], dtype=numpy.int32) - starts[token_rows]
        tokens = step.query_starts[picked][token_rows] + within
        tables = [numpy.ascontiguousarray(step.block_tables[group][picked]) for group in groups]
        arrays = [step.token_ids[tokens], tokens, lengths[token_rows] + within, token_rows, starts, lengths]
        arrays += [table.reshape(-1) for table in tables]
        packed = torch.from_numpy(numpy.concatenate(arrays).astype(numpy.int32, copy=False))
        parts = packed.to(device, non_blocking=True).split([len(array) for array in arrays])
        ids, places, positions, owners, begins, histories, *flat = parts
        longest = int(counts.max())
        return cls(
            ids=ids,
            tokens=places,
            whole=len(tokens) == int(step.query_starts[-1]) and rows == sorted(rows),
            positions=positions,
            histories={
                group: History(histories, cells.view(table.shape), positions, owners, begins, longest)
                for group, cells, table in zip(groups, flat, tables, strict=True)
            },
        )
