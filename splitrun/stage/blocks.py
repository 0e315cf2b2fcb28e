"""Storage of one layer's KV in blocks, and of its states in slots.

Accounting (which block belongs to whom) is the scheduler's; this module only writes and gathers what it is told. The
layout is [block, head, token, width]: a block is contiguous per head, which gathers several times faster than rows of
tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from splitrun.kernels.cpu.arena import zeros
from splitrun.kernels.int8_kv import dequantize_kv, quantize_kv


@dataclass(frozen=True)
class BlockView:
    """Where one batch of rows reads and writes in one KV group.

    past     history tokens that the gathered tensors hold per row, right-aligned (a sliding group holds its window)
    lengths  per row: history tokens of this row among them; the rest of the row is padding
    tables   per row: ids of the blocks that hold those tokens, in order. Shape: (blocks of the row,)
    skips    per row: tokens at the start of the first of those blocks that are not wanted
    blocks, offsets  where each new token is written. Shape: (rows * count,)
    """

    past: int
    lengths: tuple[int, ...]
    tables: tuple[Tensor, ...]
    skips: tuple[int, ...]
    blocks: Tensor
    offsets: Tensor


class BlockStore:
    """K and V of one layer.

    scales   of K and of V, where they are stored in int8. Shape: fp32 (blocks, heads, block tokens)
    """

    scales: tuple[Tensor, Tensor] | None = None

    def __init__(
        self,
        blocks: int,
        block_tokens: int,
        key: tuple[int, int],
        value: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys = _zeros((blocks, key[0], block_tokens, key[1]), dtype, device)
        self.values = _zeros((blocks, value[0], block_tokens, value[1]), dtype, device)

    def clear(self) -> None:
        """Zeros everywhere: whatever page was not there yet is."""
        for pool in (self.keys, self.values, *(self.scales or ())):
            pool.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def width(self) -> int:
        """Values of K and V of one token."""
        return sum(pool.shape[1] * pool.shape[3] for pool in (self.keys, self.values))

    def read(self, blocks: Tensor, offsets: Tensor) -> list[Tensor]:
        """K and V of the tokens at these places. Shape: twice (tokens, heads * width)."""
        return [pool[blocks, :, offsets].flatten(1) for pool in (self.keys, self.values)]

    def write(self, blocks: Tensor, offsets: Tensor, rows: Tensor) -> None:
        """Put K and V of tokens, side by side as ``read`` gives them, at these places. Modifies the blocks."""
        start = 0
        for pool in (self.keys, self.values):
            heads, width = pool.shape[1], pool.shape[3]
            part = rows[:, start : start + heads * width]
            pool[blocks, :, offsets] = part.unflatten(1, (heads, width))
            start += heads * width

    def append(self, view: BlockView, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new K and V and return them behind their history. Modifies the blocks.

        Shape: (rows, heads, count, width) -> (rows, heads, past + count, width), padding (zeros) on the left.
        """
        return _append(self.keys, view, keys), _append(self.values, view, values)


class Int8BlockStore(BlockStore):
    """K and V of one layer in int8, with a scale for each head's of a token. A row of `read` is bytes."""

    def __init__(
        self, blocks: int, block_tokens: int, key: tuple[int, int], value: tuple[int, int], device: torch.device
    ) -> None:
        super().__init__(blocks, block_tokens, key, value, torch.int8, device)
        key_scales, value_scales = (
            _zeros((blocks, heads, block_tokens, 1), torch.float32, device).squeeze(-1) for heads in (key[0], value[0])
        )
        self.scales = key_scales, value_scales

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return super().nbytes + sum(scales.nbytes for scales in self._scales)

    @property
    def width(self) -> int:
        """Bytes of K and V of one token."""
        return super().width + sum(scales.shape[1] * scales.element_size() for scales in self._scales)

    def read(self, blocks: Tensor, offsets: Tensor) -> list[Tensor]:
        """K and V of the tokens at these places. Shape: four times int8 (tokens, bytes)."""
        scales = [each[blocks, :, offsets].view(torch.int8) for each in self._scales]
        return super().read(blocks, offsets) + scales

    def write(self, blocks: Tensor, offsets: Tensor, rows: Tensor) -> None:
        """Put K and V of tokens, side by side as ``read`` gives them, at these places. Modifies the blocks."""
        start = super().width
        super().write(blocks, offsets, rows[:, :start])
        for scales in self._scales:
            stop = start + 4 * scales.shape[1]
            scales[blocks, :, offsets] = rows[:, start:stop].contiguous().view(torch.float32)
            start = stop

    def append(self, view: BlockView, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `BlockStore.append`; what is returned has the values that are stored, of new tokens too."""
        found = []
        for pool, scales, new in zip((self.keys, self.values), self._scales, (keys, values), strict=True):
            codes, own = quantize_kv(new)
            history = _append(pool, view, codes)
            factors = _append(scales.unsqueeze(-1), view, own.unsqueeze(-1)).squeeze(-1)
            found.append(dequantize_kv(history, factors, new.dtype))
        return found[0], found[1]

    @property
    def _scales(self) -> tuple[Tensor, Tensor]:
        assert self.scales is not None
        return self.scales


def _append(pool: Tensor, view: BlockView, new: Tensor) -> Tensor:
    """Write new values to a pool and return them behind their history, in their own type."""
    rows, heads, count, width = new.shape
    pool[view.blocks, :, view.offsets] = new.transpose(1, 2).reshape(rows * count, heads, width).to(pool.dtype)
    if view.past == 0:
        return new
    # whole blocks are copied in place; what of the first and last is not wanted falls into a block's room on
    # either side or is overwritten by the new tokens
    room = pool.shape[2]
    whole = new.new_zeros((rows, heads, room + view.past + count + room, width))
    for row, (length, table, skip) in enumerate(zip(view.lengths, view.tables, view.skips, strict=True)):
        if length:
            start = room + view.past - length - skip
            target = whole[row, :, start : start + len(table) * room].unflatten(1, (len(table), room))
            target.copy_(pool[table].transpose(0, 1))
    whole[:, :, room + view.past : room + view.past + count] = new
    return whole[:, :, room : room + view.past + count]


def _zeros(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; in main memory on huge pages, which reads of a long history need as much as weights do."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return zeros(math.prod(shape), dtype).view(shape)


class StateStore:
    """The states of one layer: one slot per sequence, in tensors named by (kind, index).

    ``states`` as in `LayerCache`; four-byte values are float32, others of the stage's compute type.
    """

    def __init__(
        self,
        slots: int,
        states: tuple[tuple[str, int, tuple[int, ...], int], ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shapes = {(kind, index): shape for kind, index, shape, _ in states}
        self.tensors: dict[tuple[str, int], Tensor] = {
            (kind, index): torch.zeros((slots, *shape), dtype=torch.float32 if width == 4 else dtype, device=device)
            for kind, index, shape, width in states
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def clear(self) -> None:
        """Zeros in all slots."""
        for tensor in self.tensors.values():
            tensor.zero_()

    def read(self, name: tuple[str, int], slots: Tensor) -> Tensor:
        """A copy of some slots. Shape: (rows, *state)."""
        return self.tensors[name][slots]

    def write(self, name: tuple[str, int], slots: Tensor, state: Tensor) -> None:
        """Replace some slots. Shape of ``state``: (rows, *state)."""
        self.tensors[name][slots] = state.to(self.tensors[name].dtype)
