"""Reading a tile of a weight inside a kernel: dense, int8 or nf4 values in the type that the product computes in.

Device code only. A tile has the shape (rows, columns) and begins at a multiple of 64 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

DENSE, INT8, NF4 = 0, 1, 2
"""Formats as kernels know them."""


@triton.jit
def weight_tile(
    codes,
    scales,
    table,
    rows,
    columns_from,
    columns_to,
    total_rows,
    columns,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The values of ``rows`` (a tile of row numbers) from a column on, zero beyond ``columns_to`` and the last row.

    codes, scales  as in `Nf4Weight`, `Int8Weight`, or the dense values and anything
    table          the 16 values of nf4's codes, fp32
    """
    if FORMAT == 2:
        groups = columns_from // 64 + tl.arange(0, COLUMNS // 64)
        inside = (rows < total_rows)[:, None] & (groups * 64 < columns_to)[None, :]
        pairs = tl.arange(0, 32)
        places = rows.to(tl.int64)[:, None, None] * (columns // 2) + groups[None, :, None] * 32 + pairs[None, None, :]
        packed = tl.load(codes + places, mask=inside[:, :, None], other=0).to(tl.int32)
        scale = tl.load(scales + rows.to(tl.int64)[:, None] * (columns // 64) + groups[None, :], mask=inside, other=0.0)
        first = (tl.load(table + (packed >> 4)) * scale[:, :, None]).to(TYPE)
        second = (tl.load(table + (packed & 15)) * scale[:, :, None]).to(TYPE)
        return tl.reshape(tl.join(first, second), (ROWS, COLUMNS))
    else:
        places = columns_from + tl.arange(0, COLUMNS)
        inside = (rows < total_rows)[:, None] & (places < columns_to)[None, :]
        offsets = rows.to(tl.int64)[:, None] * columns + places[None, :]
        if FORMAT == 1:
            scale = tl.load(scales + rows, mask=rows < total_rows, other=0.0)
            values = tl.load(codes + offsets, mask=inside, other=0)
            return (values.to(tl.float32) * scale[:, None]).to(TYPE)
        else:
            return tl.load(codes + offsets, mask=inside, other=0.0)
