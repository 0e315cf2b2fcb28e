"""Products of up to 16 rows with a weight as it lies in memory, one launch each: decoding.

A row's bits do not depend on the rows beside it: every launch computes a tile of 16 rows, in an order that only the
weight's shape decides. Long sums are split over several programs; the last of them to finish adds the parts up in
order. Behind the product comes the bias, the residual or the gate. Knows no models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitrun.kernels.gpu.matrix import GpuMatrix
from splitrun.kernels.gpu.values import weight_tile

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
def _product(
    x,
    codes,
    scales,
    table,
    bias,
    residual,
    out,
    parts,
    arrivals,
    rows,
    outputs,
    columns,
    FORMAT: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TURN: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
):
    """out = epilogue(x @ weight.T). Shape: x (rows, columns), out (rows, outputs).

    GATED: the weight has 2 * outputs rows, gates and then ups, and out = silu(gate) * up.
    parts     fp32 (tiles, SPANS, 2 if GATED else 1, ROWS, OUTPUTS); arrivals int32 (tiles,), zeros before and after
    """
    tile = tl.program_id(0)
    span = tl.program_id(1)
    row = tl.arange(0, ROWS)
    here = row < rows
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    total = outputs * 2 if GATED else outputs
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    ups = tl.zeros((ROWS, OUTPUTS), tl.float32)
    first = span * SPAN
    last = tl.minimum(first + SPAN, columns)
    type = x.dtype.element_ty
    for start in range(first, last, TURN):
        places = start + tl.arange(0, TURN)
        inside = here[:, None] & (places < last)[None, :]
        values = tl.load(x + row[:, None] * columns + places[None, :], mask=inside, other=0.0)
        tile_of = weight_tile(codes, scales, table, output, start, last, total if not GATED else outputs, columns,
                              FORMAT, OUTPUTS, TURN, type)  # fmt: skip
        sums = tl.dot(values, tl.trans(tile_of), sums)
        if GATED:
            second = tl.where(output < outputs, output + outputs, total)
            tile_of = weight_tile(codes, scales, table, second, start, last, total, columns, FORMAT, OUTPUTS, TURN, type)
            ups = tl.dot(values, tl.trans(tile_of), ups)
    if SPANS > 1:
        COUNT: tl.constexpr = 2 if GATED else 1
        cell = row[:, None] * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
        base = parts + tile.to(tl.int64) * (SPANS * COUNT * ROWS * OUTPUTS)
        tl.store(base + span * (COUNT * ROWS * OUTPUTS) + cell, sums)
        if GATED:
            tl.store(base + (span * COUNT + 1) * (ROWS * OUTPUTS) + cell, ups)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu")
        if arrived < SPANS - 1:
            return
        tl.debug_barrier()
        sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
        ups = tl.zeros((ROWS, OUTPUTS), tl.float32)
        for part in range(SPANS):
            sums += tl.load(base + part * (COUNT * ROWS * OUTPUTS) + cell, cache_modifier=".cg")
            if GATED:
                ups += tl.load(base + (part * COUNT + 1) * (ROWS * OUTPUTS) + cell, cache_modifier=".cg")
        tl.store(arrivals + tile, 0)
    inside = here[:, None] & (output < outputs)[None, :]
    target = row[:, None] * outputs + output[None, :]
    if BIASED:
        sums += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate = sums.to(type).to(tl.float32)
        active = (gate / (1.0 + tl.exp(-gate))).to(type).to(tl.float32) * ups.to(type).to(tl.float32)
        tl.store(out + target, active.to(type), mask=inside)
    elif ADDED:
        before = tl.load(residual + target, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + target, (before + sums.to(type).to(tl.float32)).to(type), mask=inside)
    else:
        tl.store(out + target, sums.to(type), mask=inside)


class Products:
    """Launches products of one stage, one after the other: they share the memory for parts of sums."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts = torch.empty(0, dtype=torch.float32, device=device)
        self._arrivals = torch.zeros(0, dtype=torch.int32, device=device)
        self._processors = processors(device)

    def reserve(self, matrices: list[tuple[GpuMatrix, bool]]) -> None:
        """Make room for the parts of every (matrix, gated) to come. Call before graphs are captured."""
        most = tiles_most = 1
        for matrix, gated in matrices:
            shape = self.shape(matrix, gated)
            tiles = -(-_outputs(matrix, gated) // shape.outputs)
            spans = -(-matrix.columns // shape.span)
            if spans > 1:
                most = max(most, tiles * spans * (2 if gated else 1) * ROWS * shape.outputs)
                tiles_most = max(tiles_most, tiles)
        self._parts = torch.empty(most, dtype=torch.float32, device=self._device)
        self._arrivals = torch.zeros(tiles_most, dtype=torch.int32, device=self._device)

    @property
    def nbytes(self) -> int:
        """Bytes of the shared memory."""
        return self._parts.nbytes + self._arrivals.nbytes

    def shape(self, matrix: GpuMatrix, gated: bool) -> Shape:
        """How the product with a matrix is cut: enough programs to fill the processors several times."""
        return product_shape(_outputs(matrix, gated), matrix.columns, self._processors)

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
        rows, columns = x.shape
        assert rows <= ROWS, f"{rows} rows"
        outputs = _outputs(matrix, gated)
        shape = shape or self.shape(matrix, gated)
        spans = -(-columns // shape.span)
        tiles = -(-outputs // shape.outputs)
        _product[(tiles, spans)](
            x,
            matrix.codes,
            matrix.scales,
            matrix.table,
            x if bias is None else bias,
            x if residual is None else residual,
            out,
            self._parts,
            self._arrivals,
            rows,
            outputs,
            columns,
            FORMAT=matrix.format,
            BIASED=bias is not None,
            ADDED=residual is not None,
            GATED=gated,
            ROWS=ROWS,
            OUTPUTS=shape.outputs,
            TURN=shape.turn,
            SPAN=shape.span,
            SPANS=spans,
            num_warps=shape.warps,
            num_stages=2 if matrix.format == 0 else 1,
        )
        return out


def product_shape(outputs: int, columns: int, processors: int) -> Shape:
    """The cut of a product: 16 outputs a program, and spans so short that the programs fill the GPU about six times."""
    tiles = -(-outputs // 16)
    wanted = max(1, min(6 * processors // tiles, -(-columns // 512)))
    span = -(-columns // wanted)
    turn = 512 if span >= 512 else 256
    span = -(-span // turn) * turn
    return Shape(outputs=16, turn=turn, span=span)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _outputs(matrix: GpuMatrix, gated: bool) -> int:
    return matrix.rows // 2 if gated else matrix.rows
