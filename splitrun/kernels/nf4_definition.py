"""NF4: 4-bit codes from a table of 16 normal quantiles, one fp32 maximum per block of 64 values of a row.

Definition (Dettmers et al., "QLoRA", 2023; values as bitsandbytes' ``quantize_4bit(quant_type="nf4", blocksize=64)``):
a block is divided by its largest magnitude, each value becomes the index of the nearest table entry, two indices share
a byte, the first in the high half. Blocks never cross rows, so a row length is a multiple of the block. 0.5625 bytes a
value. Checkpoints may bring another table (fp4) or block length. This module knows nothing of models.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 64
NF4_TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
CHUNK_VALUES = 1 << 18
"""Values quantized or dequantized at a time by the reference on a CPU: temporaries stay small."""
GPU_CHUNK_VALUES = 1 << 21
"""The same on other devices, where a launch costs more than it computes."""
BINS = 32
"""Bins of a unit of length in the look-up below; at most one border between two codes falls into a bin."""


def quantize_nf4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and block maxima. Shape: (..., n) -> uint8 (..., n / 2), fp32 (..., n / 64).

    The same result on every device: comparisons and one product per value, no library function that may round.
    """
    flat = values.reshape(-1)
    packed = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=values.device)
    maxima = torch.empty(flat.numel() // BLOCK, dtype=torch.float32, device=values.device)
    step = CHUNK_VALUES if values.device.type == "cpu" else GPU_CHUNK_VALUES
    for start in range(0, flat.numel(), step):
        stop = min(start + step, flat.numel())
        codes, chunk_maxima = _codes(flat[start:stop].float().view(-1, BLOCK))
        packed[start // 2 : stop // 2] = (codes[::2] << 4) | codes[1::2]
        maxima[start // BLOCK : stop // BLOCK] = chunk_maxima
    *leading, width = values.shape
    return packed.view(*leading, width // 2), maxima.view(*leading, width // BLOCK)


def _codes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest entries, and the maxima. A value on a border gets the lower code.

    The bin that a value falls into says which codes are below it, and the one border that it must be compared with:
    three look-ups instead of fifteen comparisons.
    """
    below, border = _bins(blocks.device)
    maxima = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / maxima.clamp(min=1e-38)).unsqueeze(1)).view(-1)
    bins = (scaled + 1).mul_(BINS).int().clamp_(0, 2 * BINS)
    codes = below.index_select(0, bins)
    codes.add_(scaled.gt(border.index_select(0, bins)).view(torch.uint8))
    return codes, maxima


@cache
def nf4_borders(device: torch.device) -> Tensor:
    """What lies between neighbours of the table; a value on a border gets the lower code. Shape: fp32 (15,)."""
    table = torch.tensor(NF4_TABLE)
    return ((table[1:] + table[:-1]) / 2).to(device)


@cache
def _bins(device: torch.device) -> tuple[Tensor, Tensor]:
    """Per bin from -1: how many borders lie below it (uint8), and the border inside it (fp32, infinite if none)."""
    borders = nf4_borders(torch.device("cpu"))
    edges = torch.arange(2 * BINS + 2) / BINS - 1
    below = (borders.unsqueeze(0) < edges.unsqueeze(1)).sum(1)
    padded = torch.cat([borders, torch.tensor([torch.inf])])
    inside = torch.where(padded[below] < edges + 1 / BINS, padded[below], torch.inf)
    return below.to(torch.uint8).to(device), inside.to(device)


def dequantize_reference(packed: Tensor, maxima: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The values: table entry times block maximum in fp32, rounded once. Shape: uint8 (..., n / 2) -> (..., n)."""
    # both values of a byte lie in one 8-byte entry: a single look-up in a table of 256
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1).view(torch.int64).view(-1)
    values = torch.empty(packed.numel() * 2, dtype=dtype, device=packed.device)
    block = max(1, values.numel() // max(1, maxima.numel()))
    flat, scales = packed.reshape(-1), maxima.reshape(-1, 1)
    step = (CHUNK_VALUES if packed.device.type == "cpu" else GPU_CHUNK_VALUES) // block * block
    for start in range(0, values.numel(), step):
        stop = min(start + step, values.numel())
        chunk = pairs.index_select(0, flat[start // 2 : stop // 2].int()).view(torch.float32).view(-1, block)
        values[start:stop] = chunk.mul_(scales[start // block : stop // block]).view(-1)
    return values.view(*packed.shape[:-1], packed.shape[-1] * 2)
