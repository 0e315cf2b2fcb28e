"""Values of a quantized matrix written out for torch's products, some rows at a time: prompts. Knows no models."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitrun.kernels.gpu.matrix import DENSE, TILED_INT8, TILED_NF4, GpuMatrix, Part
from splitrun.kernels.gpu.values import weight_tile

SCRATCH_VALUES = 1 << 23
"""Values written out at a time: they stay in the cache of a large GPU, and no product needs more memory than this."""


@triton.jit
def _unpack(
    codes, scales, table, out, first, rows, columns, FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    type: tl.constexpr = out.dtype.element_ty
    values = weight_tile(codes, scales, table, row, start, columns, rows, columns, FORMAT, ROWS, COLUMNS, type)
    places = start + tl.arange(0, COLUMNS)
    target = out + (row - first).to(tl.int64)[:, None] * columns + places[None, :]
    tl.store(target, values, mask=(row < rows)[:, None] & (places < columns)[None, :])


@triton.jit
def _unpack_tiled(
    codes, scales, table, out, first, rows, all_rows, columns, FORMAT: tl.constexpr, COLUMNS: tl.constexpr
):
    """One tile of 16 rows, some columns of it, from the layout of the processor's kernels: lines of four bytes."""
    tile = first // 16 + tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, 16)
    height = tl.minimum(all_rows - tile * 16, 16)
    inside = (tile * 16 + lane < rows)[:, None] & (column < columns)[None, :]
    before = (tile * 16).to(tl.int64)
    if FORMAT == 4:
        group, groups = column[None, :] // 64, columns // 64  # of nine lines, the last with the scales
        line = group * 9 + column[None, :] % 64 // 8
        at = before * (groups * 36) + line * 4 * height + lane[:, None] * 4 + column[None, :] % 4
        packed = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
        code = tl.where(((column % 8) < 4)[None, :], packed & 15, packed >> 4)
        scale_at = before * (groups * 9) + (group * 9 + 8) * height + lane[:, None]
        values = tl.load(table + code) * tl.load(scales + scale_at, mask=inside, other=0.0)
    else:
        at = before * columns + column[None, :] // 4 * 4 * height + lane[:, None] * 4 + column[None, :] % 4
        scale = tl.load(scales + before + lane, mask=before + lane < rows, other=0.0)
        values = tl.load(codes + at, mask=inside, other=0).to(tl.float32) * scale[:, None]
    target = out + (before - first + lane)[:, None] * columns + column[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=inside)


class PromptProducts:
    """Products of many rows with matrices of one stage; they share the memory for written-out values."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._scratch: Tensor | None = None

    def __call__(
        self, x: Tensor, matrix: GpuMatrix, out: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """``out`` = x @ matrix.T + bias + residual. Shape: x (tokens, columns), out and residual (tokens, rows)."""
        for start, values in self._values(matrix):
            columns = slice(start, start + values.shape[0])
            added = bias[columns] if bias is not None else None if residual is None else residual[:, columns]
            if added is None:
                torch.mm(x, values.t(), out=out[:, columns])
            else:
                torch.addmm(added, x, values.t(), out=out[:, columns])
        return out.add_(residual) if bias is not None and residual is not None else out

    def _values(self, matrix: GpuMatrix) -> Iterator[tuple[int, Tensor]]:
        """(first row, values) of pieces of the matrix; the next piece takes the memory of the one before."""
        if matrix.format == DENSE:
            yield from zip(matrix.starts, (part.codes for part in matrix.parts), strict=True)
            return
        if self._scratch is None:
            self._scratch = torch.empty(SCRATCH_VALUES, dtype=self._dtype, device=self._device)
        for part, first in zip(matrix.parts, matrix.starts, strict=True):
            pieces = -(-part.rows * matrix.columns // SCRATCH_VALUES)
            step = min(-(-part.rows // pieces // 64) * 64 + 64, SCRATCH_VALUES // matrix.columns // 16 * 16)
            for start in range(0, part.rows, step):
                stop = min(start + step, part.rows)
                yield first + start, unpacked(matrix, part, start, stop, self._scratch)


def unpacked(matrix: GpuMatrix, part: Part, start: int, stop: int, memory: Tensor) -> Tensor:
    """Values of some rows of a part, in ``memory``'s type and at its beginning. Shape: (stop - start, columns).

    Of a tiled part, ``start`` is the first row of a tile.
    """
    values = memory[: (stop - start) * matrix.columns].view(stop - start, matrix.columns)
    tiled = matrix.format in (TILED_INT8, TILED_NF4)
    grid = (triton.cdiv(stop - start, 16 if tiled else 8), triton.cdiv(matrix.columns, 256))
    where = (part.codes, part.scales, matrix.table, values, start, stop)
    if tiled:
        _unpack_tiled[grid](*where, part.rows, matrix.columns, FORMAT=matrix.format, COLUMNS=256)
    else:
        _unpack[grid](*where, matrix.columns, FORMAT=matrix.format, ROWS=8, COLUMNS=256)
    return values


@triton.jit
def _gather(codes, scales, table, ids, out, rows, columns, FORMAT: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * COLUMNS
    row = tl.load(ids + token + tl.arange(0, 1))
    type: tl.constexpr = out.dtype.element_ty
    values = weight_tile(codes, scales, table, row, start, columns, rows, columns, FORMAT, 1, COLUMNS, type)
    places = start + tl.arange(0, COLUMNS)
    tl.store(out + token * columns + places[None, :], values, mask=(places < columns)[None, :])


def gather(matrix: GpuMatrix, ids: Tensor, out: Tensor) -> Tensor:
    """Rows of an embedding table. Shape: ids int32 (tokens,), out (tokens, columns). Returns ``out``."""
    (part,) = matrix.parts
    _gather[(ids.shape[0], triton.cdiv(matrix.columns, 512))](
        part.codes, part.scales, matrix.table, ids, out, matrix.rows, matrix.columns, FORMAT=matrix.format, COLUMNS=512
    )
    return out
