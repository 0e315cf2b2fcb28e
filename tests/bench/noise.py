"""Quantized matrices of noise, made as fast as memory is written: for benches in which no value matters."""

from __future__ import annotations

import torch

from splitrun.kernels.cpu.library import Kernel
from splitrun.kernels.cpu.tiled import TILE, TiledWeight


def noisy(format: str, rows: int, columns: int, level: Kernel) -> TiledWeight:
    """Values of about ``columns ** -0.5``: a product has the size of what is multiplied. Sixteen rows, repeated."""
    weight = TiledWeight.empty(format, (rows, columns), torch.bfloat16, level)
    values = torch.randn(TILE, columns, generator=torch.Generator().manual_seed(columns)) * columns**-0.5
    piece, whole = TiledWeight.empty(format, values.shape, torch.bfloat16, level), rows // TILE
    piece.store(0, values)
    for found, repeated in zip(weight.storage, piece.storage, strict=True):
        count = whole * repeated.numel()
        found[:count].view(whole, -1).copy_(repeated)
    if rows % TILE:
        weight.store(whole * TILE, values[: rows % TILE])
    return weight
