"""A weight as the GPU kernels read it: one or more weights, their rows in order, each where it was loaded.

Queries, keys and values are multiplied in one launch, and so are gates and ups. Knows the formats' storage, no models
and no kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from splitrun.kernels.int8 import Int8Weight
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.nf4_definition import NF4_TABLE
from splitrun.kernels.weight import Weight

DENSE, INT8, NF4, TILED_INT8, TILED_NF4 = 0, 1, 2, 3, 4
"""Formats as kernels know them; tiled are those that the processor's kernels read, copied here as they lie."""
MOST_PARTS = 3

AnyWeight = Weight | Tensor


@dataclass(frozen=True)
class Part:
    """One weight of (rows, columns).

    codes   nf4: uint8 (rows, columns / 2); int8: int8 (rows, columns); dense: the values
    scales  nf4: fp32 (rows, columns / 64); int8: fp32 (rows,); dense: the values again, not read
    tiled: in the order of `splitrun/kernels/cpu/source/kernels.h`; nf4: uint8 (rows, bytes) and the same memory as fp32
    """

    codes: Tensor
    scales: Tensor

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return int(self.codes.shape[0])


@dataclass(frozen=True)
class GpuMatrix:
    """Up to three weights of one format and one number of columns. ``table``: nf4's values, fp32 (16,)."""

    format: int
    parts: tuple[Part, ...]
    columns: int
    table: Tensor

    @cached_property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The row that each part begins with."""
        return tuple(sum(part.rows for part in self.parts[:index]) for index in range(len(self.parts)))

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(part.codes.nbytes + (part.scales.nbytes if self.format != DENSE else 0) for part in self.parts)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.table.device


def matrix_of(weights: Sequence[object]) -> GpuMatrix | None:
    """The weights as one matrix; None where kernels do not read them: mixed formats or widths, another table or block
    than nf4's own, a stack, or rows that do not begin at 16 bytes."""
    first = weights[0]
    if len({type(weight) for weight in weights}) != 1 or len(weights) > MOST_PARTS:
        return None
    parts = [_part(weight) for weight in weights]
    found = [part for part in parts if part is not None]
    if len(found) != len(weights):
        return None
    format = NF4 if isinstance(first, Nf4Weight) else INT8 if isinstance(first, Int8Weight) else DENSE
    widths = {int(part.codes.shape[1]) * (2 if format == NF4 else 1) for part in found}
    device = found[0].codes.device
    return GpuMatrix(format, tuple(found), widths.pop(), nf4_table(device)) if len(widths) == 1 else None


def _part(weight: object) -> Part | None:
    if isinstance(weight, Nf4Weight):
        return Part(weight.packed, weight.maxima) if weight.standard and len(weight.shape) == 2 else None
    if isinstance(weight, Int8Weight):
        return Part(weight.codes, weight.scales) if len(weight.shape) == 2 and weight.shape[1] % 16 == 0 else None
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] % 8 or not weight.is_contiguous():
        return None
    return Part(weight.detach(), weight.detach())


def nf4_table(device: torch.device) -> Tensor:
    """The values of nf4's codes. Shape: fp32 (16,)."""
    return torch.tensor(NF4_TABLE, device=device)
