"""Reading a tile of a weight inside a kernel: dense, int8 or nf4 values in the type that the product computes in.

A tile has the shape (rows, columns) and begins at a multiple of 64 columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from splitrun.kernels.nf4_definition import NF4_TABLE

_HALF = """
    {{
    .reg .b32 word, low, pick, first, second, lows, highs;
    {shift}
    and.b32 low, word, 0x7777;
    shr.u32 pick, word, 1;
    and.b32 pick, pick, 0x4444;
    or.b32 pick, pick, 0x3210;
    prmt.b32 first, {table[0]}, {table[1]}, low;
    prmt.b32 second, {table[2]}, {table[3]}, low;
    prmt.b32 lows, first, second, pick;
    prmt.b32 first, {table[4]}, {table[5]}, low;
    prmt.b32 second, {table[6]}, {table[7]}, low;
    prmt.b32 highs, first, second, pick;
    prmt.b32 {evens}, lows, highs, 0x7351;
    prmt.b32 {odds}, lows, highs, 0x6240;
    }}
"""
"""Four codes (16 bits) to four two-byte values: a table of 16 is looked up as four tables of 8 bytes, the lower bytes
of the values and then the upper ones; the code's highest bit picks between the halves."""


def _assembly(dtype: torch.dtype) -> str:
    """PTX that turns four bytes into the table's values of their high and of their low halves, rounded to a type."""
    values = torch.tensor(NF4_TABLE).to(dtype).view(torch.int16).tolist()
    planes = [[value >> shift & 0xFF for value in values] for shift in (0, 8)]
    words = [
        "0x" + "".join(f"{byte:02x}" for byte in reversed(plane[start : start + 4]))
        for plane in planes
        for start in range(0, 16, 4)
    ]
    halves = (("mov.b32 word, $4;", "$0", "$2"), ("shr.u32 word, $4, 16;", "$1", "$3"))
    return "".join(_HALF.format(shift=shift, table=words, evens=evens, odds=odds) for shift, evens, odds in halves)


BF16_ASSEMBLY = tl.constexpr(_assembly(torch.bfloat16))
FP16_ASSEMBLY = tl.constexpr(_assembly(torch.float16))


@triton.jit
def nf4_values(packed, table, TYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The table's values of the high and of the low halves of bytes, rounded to a type.

    ``ASSEMBLY``: by permuting bytes in registers, as NVIDIA's cards can, instead of looking up in memory: ten times as
    fast there.
    """
    if ASSEMBLY:
        if tl.bfloat16 == TYPE:
            first, second = tl.inline_asm_elementwise(
                BF16_ASSEMBLY, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            first, second = tl.inline_asm_elementwise(
                FP16_ASSEMBLY, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
    else:
        codes = packed.to(tl.int32)
        first = tl.load(table + (codes >> 4)).to(TYPE)
        second = tl.load(table + (codes & 15)).to(TYPE)
    return first, second


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
        tile = tl.reshape(tl.join(first, second), (ROWS, COLUMNS))
    else:
        places = columns_from + tl.arange(0, COLUMNS)
        inside = (rows < total_rows)[:, None] & (places < columns_to)[None, :]
        offsets = rows.to(tl.int64)[:, None] * columns + places[None, :]
        if FORMAT == 1:
            scale = tl.load(scales + rows, mask=rows < total_rows, other=0.0)
            values = tl.load(codes + offsets, mask=inside, other=0)
            tile = (values.to(tl.float32) * scale[:, None]).to(TYPE)
        else:
            tile = tl.load(codes + offsets, mask=inside, other=0.0)
    return tile
