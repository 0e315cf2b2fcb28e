"""The products of `source/product.cu`: compiled at first use, tested before they are trusted.

They take NVIDIA's cards from compute capability 8.0 on. Knows weights as matrices, no models.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib import resources

import torch
from torch import Tensor

from splitrun.kernels.gpu.cuda import CudaKernels, CudaUnavailable
from splitrun.kernels.gpu.matrix import DENSE, INT8, MOST_PARTS, NF4, AnyWeight, GpuMatrix, matrix_of
from splitrun.kernels.int8 import Int8Weight
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.nf4_definition import NF4_TABLE, dequantize_reference
from splitrun.kernels.weight import Weight

LEAST_CAPABILITY = (8, 0)
PIECE, TILE = 64, 16
MOST_WARPS = {DENSE: 24, INT8: 16, NF4: 16}
"""Warps of a block, as the registers allow."""
GROUP = {DENSE: 1, INT8: 2, NF4: 4}
"""Pieces of 64 columns that a warp reads at a time."""
TABLE_BYTES = {DENSE: 0, INT8: 0, NF4: 256 * 32 * 4}
"""The look-up table in shared memory. Every block fills it, so there is no more than one block a multiprocessor."""
MOST_COPIED_BYTES = {DENSE: 25 << 10, INT8: 25 << 10, NF4: 0}
"""Rows of x that take no more than this are copied to shared memory first. With all else that fits the 99 KiB which the
cards of capability 8.6 have."""
TILE_COST = 0.1
"""What the end of a tile takes, in groups of pieces: sums of a team are added and stored."""
ALIKE = 1.02
"""Of cuts that take as long within this, the one with the largest teams: they read neighbouring memory together."""
NOWHERE = 2**31 - 1
"""The first row of a part that is not there."""
TOLERANCE = 0.01
"""Error that the self-test allows, of the product's norm."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cut:
    """How a product is cut: warps that share a tile (a team), teams of a block, and blocks."""

    size: int
    teams: int
    blocks: int


class DirectProducts:
    """Launches the products with matrices of one format and type."""

    def __init__(self, format: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compile. Raises CudaUnavailable."""
        folder = resources.files("splitrun.kernels.gpu").joinpath("source")
        source = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("machine.cuh", "product.cu"))
        defines: dict[str, str | int] = {"FORMAT": format, "BF16": int(dtype == torch.bfloat16)}
        defines |= {"THREADS": 32 * MOST_WARPS[format], "TABLE": _table(dtype)}
        self._kernels = CudaKernels(source, defines, device)
        if self._kernels.shared_bytes < shared_bytes(format, MOST_WARPS[format], 2) + MOST_COPIED_BYTES[format]:
            raise CudaUnavailable(f"blocks have {self._kernels.shared_bytes >> 10} KiB of shared memory")
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count

    def __call__(
        self,
        x: Tensor,
        matrix: GpuMatrix,
        out: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        gated: bool,
        cut: Cut | None = None,
    ) -> None:
        """As `Products.__call__`, cut as it is said or else by `product_cut`."""
        rows, columns = x.shape
        outputs = matrix.rows // 2 if gated else matrix.rows
        eights = 1 if rows <= 8 else 2
        cut = cut or product_cut(matrix.format, outputs, columns, gated, self._processors)
        warps = cut.size * cut.teams
        x_bytes = rows * (columns + 8) * 2
        copied_bytes = x_bytes if x_bytes <= MOST_COPIED_BYTES[matrix.format] else 0
        self._kernels.launch(
            f"{'gated' if gated else 'plain'}_{8 * eights}",
            cut.blocks,
            32 * warps,
            shared_bytes(matrix.format, warps, eights) + copied_bytes,
            (x, *_pointers(matrix), bias, residual, out, rows, outputs, columns, cut.size, int(copied_bytes > 0)),
        )


def shared_bytes(format: int, warps: int, eights: int) -> int:
    """Shared memory of a block: the table, and each warp's sums for up to 8 or 16 rows, twice. Without a copy of x."""
    return TABLE_BYTES[format] + 2 * warps * TILE * 8 * eights * 4


@cache
def product_cut(format: int, outputs: int, columns: int, gated: bool, processors: int) -> Cut:
    """The cut of a product: the matrix's shape and the card alone decide, so that a row's bits do not depend on the
    step."""
    tiles = -(-outputs // (TILE // 2 if gated else TILE))
    groups = -(-columns // (PIECE * GROUP[format]))
    most = MOST_WARPS[format]

    def turns(size: int) -> float:
        rounds = -(-tiles // (processors * (most // size)))
        return rounds * (-(-groups // size) + TILE_COST)

    sizes = range(1, min(most, groups) + 1)
    least = min(map(turns, sizes))
    size = max(size for size in sizes if turns(size) <= ALIKE * least)
    return Cut(size, min(most // size, -(-tiles // processors)), min(processors, tiles))


def takes(matrix: GpuMatrix) -> bool:
    """Whether the kernels read a matrix of this shape, lying where it does: 16 bytes at a time."""
    read = [part.codes for part in matrix.parts] + [part.scales for part in matrix.parts if matrix.format == NF4]
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in read)
    return matrix.columns % PIECE == 0 and matrix.columns >= PIECE * GROUP[matrix.format] and aligned


def _pointers(matrix: GpuMatrix) -> list[Tensor | int]:
    """Codes, scales and first rows as the kernels take them, three parts whether there are so many or not."""
    parts = [*matrix.parts, *[matrix.parts[0]] * (MOST_PARTS - len(matrix.parts))]
    starts = [*matrix.starts[1:], *[NOWHERE] * (MOST_PARTS - len(matrix.parts))]
    return [*(part.codes for part in parts), *(part.scales for part in parts), *starts]


@cache
def direct_products(format: int, dtype: torch.dtype, device: torch.device) -> DirectProducts | None:
    """The products for a device; None where it cannot run them or they fail their test, which one warning tells."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in (torch.bfloat16, torch.float16):
        return None
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return None
    try:
        found = DirectProducts(format, dtype, device)
        error = _error(found, format, dtype, device)
    except CudaUnavailable as reason:
        _LOG.warning("the CUDA products are not used: %s", reason)
        return None
    if not error < TOLERANCE:
        _LOG.warning("the CUDA products are not used: their self-test was off by %.2g", error)
        return None
    return found


TESTS = (
    # rows, rows of the parts, columns, cut
    (1, (40, 20, 20), 320, None),
    (5, (30, 30), 256, None),
    (16, (24, 24), 1088, None),
    (1, (150, 154), 576, Cut(1, 3, 2)),  # teams of one warp, several tiles for each
    (8, (88, 88), 1536, Cut(2, 3, 2)),  # columns that are copied only just
    (4, (40, 40), 4096, Cut(3, 2, 1)),  # too many columns to be copied
    (11, (88, 88), 512, Cut(2, 3, 1)),  # rows of x that are not there
)


def _error(products: DirectProducts, format: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error of the test products, as a share of the product's norm; NaN where something was not written.

    Computed on the processor: what multiplies on the card takes a hundred MiB of main memory for the life of the
    process.
    """
    generator = torch.Generator().manual_seed(5)
    errors = []
    largest = (16, (200, 200), 768, Cut(2, MOST_WARPS[format] // 2, 1))  # of shared memory
    for rows, outputs, columns, cut in (*TESTS, largest):
        x = torch.randn(rows, columns, generator=generator).to(dtype)
        weights: list[AnyWeight] = []
        for count in outputs:
            values = torch.randn(count, columns, generator=generator)
            if format == DENSE:
                weights.append(values.to(dtype))
                continue
            weight = (Nf4Weight if format == NF4 else Int8Weight).empty((count, columns), dtype, "cpu")
            weight.store(0, values)
            weights.append(weight)
        matrix = matrix_of(
            [weight.moved(device) if isinstance(weight, Weight) else weight.to(device) for weight in weights]
        )
        assert matrix is not None
        exact = x.double() @ torch.cat([_values(weight) for weight in weights]).double().T
        bias, residual = (torch.randn(shape, generator=generator).to(dtype) for shape in (exact.shape[1:], exact.shape))
        found = torch.full(exact.shape, torch.nan, dtype=dtype, device=device)
        products(x.to(device), matrix, found, None, None, False, cut)
        errors.append(_share(found, exact))
        found = residual.to(device, copy=True)
        products(x.to(device), matrix, found, bias.to(device), found, False, cut)
        errors.append(_share(found, exact + bias.double() + residual.double()))
        if len(outputs) == 2:
            gate, up = exact.chunk(2, 1)
            found = torch.full(gate.shape, torch.nan, dtype=dtype, device=device)
            products(x.to(device), matrix, found, None, None, True, cut)
            errors.append(_share(found, torch.nn.functional.silu(gate) * up))
    return float(torch.tensor(errors).max())


def _share(found: Tensor, exact: Tensor) -> float:
    return float((found.cpu().double() - exact).norm() / exact.norm())


def _values(weight: AnyWeight) -> Tensor:
    """By the definition of its format: no library is loaded for a test."""
    if isinstance(weight, Nf4Weight):
        return dequantize_reference(weight.packed, weight.maxima, torch.tensor(NF4_TABLE), weight.dtype)
    return weight.dequantize() if isinstance(weight, Weight) else weight


def _table(dtype: torch.dtype) -> str:
    """nf4's values in a type, as `product.cu` wants them."""
    values = torch.tensor(NF4_TABLE).to(dtype).view(torch.int16).tolist()
    return ", ".join(f"0x{value & 0xFFFF:04x}" for value in values)
