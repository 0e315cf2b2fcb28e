"""Weights brought into int8 and nf4 on a card, as their definitions say, bit for bit: one launch for each tensor.

The same in torch is a dozen operations, whose kernels stay loaded for the life of the process: tens of MiB of the card
and more of main memory. Knows tensors alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitrun.kernels.int8 import INVERSE_127
from splitrun.kernels.nf4_definition import BLOCK, nf4_borders

BORDERS: tl.constexpr = tl.constexpr(15)
TO_EVEN: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 x 2^23: what is added to it is rounded to a whole number, halves to the even one."""
BLOCKS_EACH = 8
COLUMNS_EACH = 1024


@triton.jit
def _nf4(values, borders, packed, maxima, blocks, LENGTH: tl.constexpr, BLOCKS: tl.constexpr):
    """Some blocks: a byte has two codes, the first in the high half."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    pair = tl.arange(0, LENGTH // 2)
    inside = (block < blocks)[:, None] & (pair >= 0)[None, :]
    places = block[:, None] * LENGTH + pair[None, :] * 2
    first = tl.load(values + places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(values + places + 1, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)
    least, one = tl.full((BLOCKS,), 1e-38, tl.float32), tl.full((BLOCKS,), 1.0, tl.float32)
    inverse = tl.div_rn(one, tl.maximum(largest, least))[:, None]
    first, second = first * inverse, second * inverse
    high, low = tl.zeros_like(first).to(tl.int32), tl.zeros_like(first).to(tl.int32)
    for index in tl.static_range(BORDERS):
        border = tl.load(borders + index)
        high += (first > border).to(tl.int32)
        low += (second > border).to(tl.int32)
    target = packed + block[:, None] * (LENGTH // 2) + pair[None, :]
    tl.store(target, (high * 16 + low).to(tl.uint8), mask=inside)
    tl.store(maxima + block, largest, mask=block < blocks)


@triton.jit
def _int8(values, codes, scales, columns, INVERSE: tl.constexpr, COLUMNS: tl.constexpr):
    """One row, read twice: for its largest magnitude, and for its codes."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, COLUMNS)
    largest = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, columns, COLUMNS):
        inside = start + place < columns
        found = tl.load(values + row * columns + start + place, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(found))
    scale = tl.max(largest, axis=0) * INVERSE
    tl.store(scales + row, scale)
    divisor = tl.where(scale > 0.0, scale, 1.0) + tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, columns, COLUMNS):
        inside = start + place < columns
        found = tl.load(values + row * columns + start + place, mask=inside, other=0.0).to(tl.float32)
        whole = (tl.div_rn(found, divisor) + TO_EVEN) - TO_EVEN
        code = tl.minimum(tl.maximum(whole, -127.0), 127.0).to(tl.int8)
        tl.store(codes + row * columns + start + place, code, mask=inside)


def nf4_into(values: Tensor, packed: Tensor, maxima: Tensor) -> None:
    """Quantize. Shape: values (..., n) -> packed uint8 (..., n / 2), maxima fp32 (..., n / 64), both contiguous."""
    flat, blocks = values.contiguous(), maxima.numel()
    borders = nf4_borders(values.device)
    grid = (triton.cdiv(blocks, BLOCKS_EACH),)
    with torch.cuda.device_of(values):
        _nf4[grid](flat, borders, packed, maxima, blocks, LENGTH=BLOCK, BLOCKS=BLOCKS_EACH, num_warps=4)


def int8_into(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Quantize. Shape: values (..., n) -> codes int8 (..., n), scales fp32 (...), both contiguous."""
    flat, columns = values.contiguous(), values.shape[-1]
    with torch.cuda.device_of(values):
        _int8[(scales.numel(),)](flat, codes, scales, columns, INVERSE=INVERSE_127, COLUMNS=COLUMNS_EACH, num_warps=4)
