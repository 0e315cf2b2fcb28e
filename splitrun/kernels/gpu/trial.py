"""The products of `direct.py` on trial: small ones of every kind beside the processor's figures.

By the definitions of the formats: no library is loaded for it, here or on the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitrun.kernels.gpu.cut import MOST_WARPS, Cut
from splitrun.kernels.gpu.matrix import DENSE, NF4, AnyWeight, matrix_of
from splitrun.kernels.int8 import Int8Weight
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.nf4_definition import NF4_TABLE, dequantize_reference
from splitrun.kernels.weight import Weight

if TYPE_CHECKING:
    from splitrun.kernels.gpu.direct import DirectProducts

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


def largest_error(products: DirectProducts, format: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error of the test products, as a share of the product's norm; NaN where something was not written.

    Computed on the processor: what multiplies on the card takes a hundred MiB of main memory for the life of the
    process.
    """
    generator = torch.Generator().manual_seed(5)
    errors = []
    largest = (16, (200, 200), 768, Cut(2, MOST_WARPS[format] // 2, 1))  # of shared memory
    for rows, outputs, columns, cut in (*TESTS, largest):
        x = torch.randn(rows, columns, generator=generator).to(dtype)
        weights = random_weights(format, outputs, columns, dtype, generator)
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


def random_weights(
    format: int, outputs: Sequence[int], columns: int, dtype: torch.dtype, generator: torch.Generator
) -> list[AnyWeight]:
    """Weights on the processor, of so many rows each. Shape: (rows, columns)."""
    weights: list[AnyWeight] = []
    for rows in outputs:
        values = torch.randn(rows, columns, generator=generator)
        if format == DENSE:
            weights.append(values.to(dtype))
            continue
        weight = (Nf4Weight if format == NF4 else Int8Weight).empty((rows, columns), dtype, "cpu")
        weight.store(0, values)
        weights.append(weight)
    return weights


def _share(found: Tensor, exact: Tensor) -> float:
    return float((found.cpu().double() - exact).norm() / exact.norm())


def _values(weight: AnyWeight) -> Tensor:
    if isinstance(weight, Nf4Weight):
        return dequantize_reference(weight.packed, weight.maxima, torch.tensor(NF4_TABLE), weight.dtype)
    return weight.dequantize() if isinstance(weight, Weight) else weight
