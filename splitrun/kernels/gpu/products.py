"""Products of up to 16 rows with a weight as it lies in memory, one launch each: decoding.

A row's bits do not depend on the rows beside it: the order of its sums is decided by the weight's shape and the card
alone. NVIDIA's newer cards run the kernel of `direct.py`. For others there is the one here, in Triton: long sums are
split over several programs, and the last of them to finish adds the parts up in order. Behind the product comes the
bias, the residual or the gate. Knows no models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitrun.kernels.gpu.direct import DirectProducts, direct_products, takes
from splitrun.kernels.gpu.matrix import NF4, GpuMatrix, Part
from splitrun.kernels.gpu.values import nf4_values

ROWS = 16
"""Rows of a tile: the most that one call takes."""


@dataclass(frozen=True)
class Shape:
    """How a product is cut into programs: columns of the result per program, and columns of the weight per turn and
    per program."""

    outputs: int
    turn: int
    span: int
    warps: int = 4


@triton.jit
def _nf4_sums(
    x, codes, scales, exists, table, row, rows, first, last, columns, ASSEMBLY: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, TURN: tl.constexpr
):  # fmt: skip
    """Sums over columns first to last for rows ``row`` to ``row + ROWS`` (up to 4) of an nf4 weight, in fp32.

    Each thread multiplies the values that it unpacks, so that no matrix unit is needed. ``codes`` and ``scales`` point
    at the weight rows, ``exists`` says which there are. Shape of the result: (ROWS, OUTPUTS).
    """
    BLOCKS: tl.constexpr = TURN // 64
    type: tl.constexpr = x.dtype.element_ty
    byte, block, place = tl.arange(0, 32), tl.arange(0, BLOCKS), tl.arange(0, 64)
    bytes_at = codes[:, None, None] + (block * 32)[None, :, None] + byte[None, None, :]
    scales_at = scales[:, None] + block[None, :]
    x_at = x + row.to(tl.int64) * columns + (block * 64)[:, None] + place[None, :]
    sums0 = tl.zeros((OUTPUTS, BLOCKS, 32), tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    inside = first + block * 64 < last
    there = exists[:, None] & inside[None, :]
    packed = tl.load(bytes_at + first // 2, mask=there[:, :, None], other=0)
    scale = tl.load(scales_at + first // 64, mask=there, other=0.0)
    for start in range(first, last, TURN):
        known = inside
        inside = start + TURN + block * 64 < last
        there = exists[:, None] & inside[None, :]
        next_packed = tl.load(bytes_at + (start + TURN) // 2, mask=there[:, :, None], other=0)
        next_scale = tl.load(scales_at + (start + TURN) // 64, mask=there, other=0.0)
        high, low = nf4_values(packed, table, type, ASSEMBLY)
        high, low = high.to(tl.float32), low.to(tl.float32)
        for index in tl.static_range(ROWS):
            here = known & (block * 0 + row + index < rows)
            values = tl.load(x_at + index * columns + start, mask=here[:, None], other=0.0).to(tl.float32)
            even, odd = tl.split(tl.reshape(values, (BLOCKS, 32, 2)))
            part = (high * even[None, :, :] + low * odd[None, :, :]) * scale[:, :, None]
            if index == 0:
                sums0 += part
            elif index == 1:
                sums1 += part
            elif index == 2:
                sums2 += part
            else:
                sums3 += part
        packed, scale = next_packed, next_scale
    sums = tl.sum(tl.sum(sums0, axis=2), axis=1)[None, :]
    if ROWS > 1:
        index = tl.arange(0, ROWS)[:, None]
        sums = tl.where(index == 1, tl.sum(tl.sum(sums1, axis=2), axis=1)[None, :], sums)
        if ROWS > 2:
            sums = tl.where(index == 2, tl.sum(tl.sum(sums2, axis=2), axis=1)[None, :], sums)
            sums = tl.where(index == 3, tl.sum(tl.sum(sums3, axis=2), axis=1)[None, :], sums)
    return sums


@triton.jit
def _sums(
    x, codes, scales, exists, rows, first, last, columns, FORMAT: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, TURN: tl.constexpr
):  # fmt: skip
    """As ``_nf4_sums`` for dense and int8 weights and all 16 rows, on the matrix units."""
    type: tl.constexpr = x.dtype.element_ty
    row = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(first, last, TURN):
        places = start + tl.arange(0, TURN)
        inside = places < last
        values = tl.load(x + row[:, None] * columns + places[None, :], mask=(row < rows)[:, None] & inside[None, :],
                         other=0.0)  # fmt: skip
        weight = tl.load(codes[:, None] + places[None, :], mask=exists[:, None] & inside[None, :], other=0)
        sums = tl.dot(values, tl.trans(weight.to(type)), sums)
    if FORMAT == 1:
        sums *= tl.load(scales, mask=exists, other=0.0)[None, :]
    return sums


@triton.jit
def _gated(gate, up, type: tl.constexpr):
    """silu(gate) * up, each step rounded to ``type`` as torch's operators do."""
    gate, up = gate.to(type).to(tl.float32), up.to(type).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(type).to(tl.float32)
    return (active * up).to(type)


@triton.jit
def _finished(
    sums, bias_at, residual_at, exists, inside, type: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr
):  # fmt: skip
    """Sums with their bias, then with the residual, in ``type``."""
    if BIASED:
        sums += tl.load(bias_at, mask=exists, other=0.0).to(tl.float32)[None, :]
    if ADDED:
        before = tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
        sums = before + sums.to(type).to(tl.float32)
    return sums.to(type)


@triton.jit
def _product(
    x, codes, scales, other_codes, other_scales, table, bias, residual, out, parts, arrivals, rows, outputs, stride,
    columns, FORMAT: tl.constexpr, ASSEMBLY: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, TURN: tl.constexpr, SPAN: tl.constexpr,
    SPANS: tl.constexpr
):  # fmt: skip
    """out = epilogue(x @ weight.T). Shape: x (rows, columns), out (rows, outputs), ``stride`` values from row to row.

    GATED: the weight has gates and the other one ups, and out = silu(gate) * up.
    ROWS      rows that a program computes
    parts     fp32 (row groups, tiles, SPANS, ROWS, weight rows of a tile)
    arrivals  int32 (row groups, tiles), zeros before and after
    """
    tile, span, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    EACH: tl.constexpr = 2 if GATED else 1
    WEIGHT_ROWS: tl.constexpr = OUTPUTS * EACH
    lane = tl.arange(0, WEIGHT_ROWS)
    weight_row = (tile * OUTPUTS + lane // EACH).to(tl.int64)  # a gate and its up lie side by side in the tile
    exists = weight_row < outputs
    weight_row = tl.where(exists, weight_row, 0)
    row_codes = columns // 2 if FORMAT == 2 else columns
    row_scales = columns // 64 if FORMAT == 2 else 1
    codes_at, scales_at = codes + weight_row * row_codes, scales + weight_row * row_scales
    if GATED:
        codes_at = tl.where(lane % 2 == 0, codes_at, other_codes + weight_row * row_codes)
        scales_at = tl.where(lane % 2 == 0, scales_at, other_scales + weight_row * row_scales)
    first = span * SPAN
    last = tl.minimum(first + SPAN, columns)
    if FORMAT == 2:
        sums = _nf4_sums(x, codes_at, scales_at, exists, table, group * ROWS, rows, first, last, columns, ASSEMBLY,
                         ROWS, WEIGHT_ROWS, TURN)  # fmt: skip
    else:
        sums = _sums(x, codes_at, scales_at, exists, rows, first, last, columns, FORMAT, ROWS, WEIGHT_ROWS, TURN)
    row = group * ROWS + tl.arange(0, ROWS)
    if SPANS > 1:
        cell = tl.arange(0, ROWS)[:, None] * WEIGHT_ROWS + lane[None, :]
        place = group * tl.num_programs(0) + tile
        base = parts + place.to(tl.int64) * (SPANS * ROWS * WEIGHT_ROWS)
        here = (row < rows)[:, None]
        tl.store(base + span * (ROWS * WEIGHT_ROWS) + cell, sums, mask=here)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + place, 1, sem="acq_rel", scope="gpu")
        if arrived < SPANS - 1:
            return
        tl.debug_barrier()
        sums = tl.zeros((ROWS, WEIGHT_ROWS), tl.float32)
        for part in range(SPANS):
            sums += tl.load(base + part * (ROWS * WEIGHT_ROWS) + cell, mask=here, other=0.0, cache_modifier=".cg")
        tl.store(arrivals + place, 0)
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    target = row[:, None] * stride + output[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(sums, (ROWS, OUTPUTS, 2)))
        tl.store(out + target, _gated(gate, up, x.dtype.element_ty), mask=inside)
    else:
        result = _finished(sums, bias + output, residual + target, output < outputs, inside, x.dtype.element_ty, BIASED,
                           ADDED)  # fmt: skip
        tl.store(out + target, result, mask=inside)


class Products:
    """Launches products of one stage, one after the other: they share the memory for parts of sums.

    By `DirectProducts` where a card runs those, else by Triton.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts = torch.empty(0, dtype=torch.float32, device=device)
        self._arrivals = torch.zeros(0, dtype=torch.int32, device=device)
        self._processors = processors(device)
        self._assembly = device.type == "cuda" and torch.version.hip is None

    def reserve(self, matrices: list[tuple[GpuMatrix, bool]], dtype: torch.dtype) -> None:
        """Make room for the parts of every (matrix, gated) to come. Call before graphs are captured."""
        most = tiles_most = 1
        for matrix, gated in matrices:
            if self._direct(matrix, dtype) is not None:
                continue
            shape = self.shape(matrix, gated)
            tiles = -(-_outputs(matrix, gated) // shape.outputs)
            spans = -(-matrix.columns // shape.span)
            if spans > 1:
                most = max(most, tiles * spans * (2 if gated else 1) * ROWS * shape.outputs)
                tiles_most = max(tiles_most, tiles * ROWS)
        self._parts = torch.empty(most, dtype=torch.float32, device=self._device)
        self._arrivals = torch.zeros(tiles_most, dtype=torch.int32, device=self._device)

    @property
    def nbytes(self) -> int:
        """Bytes of the shared memory."""
        return self._parts.nbytes + self._arrivals.nbytes

    def shape(self, matrix: GpuMatrix, gated: bool) -> Shape:
        """How the product with a matrix is cut: enough programs to fill the processors several times."""
        return product_shape(_outputs(matrix, gated), matrix.columns, self._processors, gated)

    def __call__(
        self,
        x: Tensor,
        matrix: GpuMatrix,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
        shape: Shape | None = None,
    ) -> Tensor:
        """``out`` = x @ matrix.T, then + bias, + residual, or silu(gate) * up. Returns ``out``.

        Shape: x (rows, columns) with up to 16 rows, out (rows, outputs); all contiguous and of one type. ``gated``: the
        matrix's rows are gates and then ups. ``residual`` has the shape of ``out`` and may be ``out`` itself.
        """
        assert x.shape[0] <= ROWS, f"{x.shape[0]} rows"
        direct = self._direct(matrix, x.dtype)
        if direct is not None and shape is None:
            direct(x, matrix, out, bias, residual, gated)
            return out
        shape = shape or self.shape(matrix, gated)
        if gated:
            self._launch(x, matrix, matrix.parts[0], out, None, None, shape, gated)
            return out
        for part, start in zip(matrix.parts, matrix.starts, strict=True):
            columns = slice(start, start + part.rows)
            own_bias = None if bias is None else bias[columns]
            own_residual = None if residual is None else residual[:, columns]
            self._launch(x, matrix, part, out[:, columns], own_bias, own_residual, shape, gated)
        return out

    def _direct(self, matrix: GpuMatrix, dtype: torch.dtype) -> DirectProducts | None:
        return direct_products(matrix.format, dtype, self._device) if takes(matrix) else None

    def _launch(
        self,
        x: Tensor,
        matrix: GpuMatrix,
        part: Part,
        out: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        shape: Shape,
        gated: bool,
    ) -> None:
        (rows, columns), outputs, other = x.shape, part.rows, matrix.parts[-1]
        spans, tiles = -(-columns // shape.span), -(-outputs // shape.outputs)
        group = ROWS if matrix.format != NF4 else 1 if rows == 1 else 2 if rows == 2 else 4
        _product[(tiles, spans, -(-rows // group))](
            x,
            part.codes,
            part.scales,
            other.codes,
            other.scales,
            matrix.table,
            x if bias is None else bias,
            x if residual is None else residual,
            out,
            self._parts,
            self._arrivals,
            rows,
            outputs,
            out.stride(0),
            columns,
            FORMAT=matrix.format,
            ASSEMBLY=self._assembly,
            BIASED=bias is not None,
            ADDED=residual is not None,
            GATED=gated,
            ROWS=group,
            OUTPUTS=shape.outputs,
            TURN=shape.turn,
            SPAN=shape.span,
            SPANS=spans,
            num_warps=shape.warps,
            num_stages=2 if matrix.format == 0 else 1,
        )


def product_shape(outputs: int, columns: int, processors: int, gated: bool) -> Shape:
    """The cut of a product: 8 weight rows a program, or 16 where both are gates and ups, and spans so short that the
    programs fill the GPU about six times."""
    tiles = -(-outputs // 8)
    wanted = max(1, min(6 * processors // tiles, -(-columns // 512)))
    span = -(-columns // wanted)
    return Shape(outputs=4 if gated else 8, turn=256, span=-(-span // 256) * 256)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _outputs(matrix: GpuMatrix, gated: bool) -> int:
    return matrix.rows // 2 if gated else matrix.rows
