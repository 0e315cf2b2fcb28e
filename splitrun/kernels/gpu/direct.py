"""The products of `source/product.cu`: compiled at first use, tested before they are trusted.

They take NVIDIA's cards from compute capability 8.0 on. Knows weights as matrices, no models.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import resources

import torch
from torch import Tensor

from splitrun.kernels.gpu.cuda import CudaKernels, CudaUnavailable
from splitrun.kernels.gpu.cut import GROUP, MOST_COPIED_BYTES, MOST_WARPS, PIECE, Cut, product_cut, shared_bytes
from splitrun.kernels.gpu.matrix import MOST_PARTS, NF4, GpuMatrix
from splitrun.kernels.gpu.trial import largest_error
from splitrun.kernels.nf4_definition import NF4_TABLE

LEAST_CAPABILITY = (8, 0)
NOWHERE = 2**31 - 1
"""The first row of a part that is not there."""
TOLERANCE = 0.01
"""Error that the self-test allows, of the product's norm."""

_LOG = logging.getLogger(__name__)


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
        error = largest_error(found, format, dtype, device)
    except CudaUnavailable as reason:
        _LOG.warning("the CUDA products are not used: %s", reason)
        return None
    if not error < TOLERANCE:
        _LOG.warning("the CUDA products are not used: their self-test was off by %.2g", error)
        return None
    return found


def _table(dtype: torch.dtype) -> str:
    """nf4's values in a type, as `product.cu` wants them."""
    values = torch.tensor(NF4_TABLE).to(dtype).view(torch.int16).tolist()
    return ", ".join(f"0x{value & 0xFFFF:04x}" for value in values)
