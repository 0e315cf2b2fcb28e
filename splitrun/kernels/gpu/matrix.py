"""A weight as the GPU kernels read it: rows of several weights one below the other, in their own format.

Knows the formats' storage, no models and no kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitrun.kernels.int8 import Int8Weight
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.nf4_definition import NF4_TABLE
from splitrun.kernels.weight import Weight

DENSE, INT8, NF4 = 0, 1, 2
"""Formats as kernels know them."""

AnyWeight = Weight | Tensor


@dataclass(frozen=True)
class GpuMatrix:
    """A matrix of (rows, columns).

    codes   nf4: uint8 (rows, columns / 2); int8: int8 (rows, columns); dense: the values
    scales  nf4: fp32 (rows, columns / 64); int8: fp32 (rows,); dense: the values again, not read
    table   fp32 (16,), nf4's values
    """

    format: int
    codes: Tensor
    scales: Tensor
    table: Tensor
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.codes.nbytes + (self.scales.nbytes if self.format != DENSE else 0)


def joined(weights: Sequence[AnyWeight]) -> tuple[GpuMatrix, list[AnyWeight]]:
    """The weights as one matrix, and the same weights as views of its storage, to stand where they stood.

    All of one format and one number of columns. A single weight's storage is taken as it is.
    """
    first = weights[0]
    rows, columns = sum(int(weight.shape[0]) for weight in weights), int(first.shape[1])
    format, codes, scales = _storage(weights)
    table = torch.tensor(NF4_TABLE, device=codes.device)
    views: list[AnyWeight] = []
    start = 0
    for weight in weights:
        stop = start + int(weight.shape[0])
        part = codes[start:stop]
        if isinstance(weight, Nf4Weight):
            views.append(Nf4Weight(part, scales[start:stop], weight.dtype))
        elif isinstance(weight, Int8Weight):
            views.append(Int8Weight(part, scales[start:stop], weight.dtype))
        else:
            views.append(torch.nn.Parameter(part, requires_grad=False))
        start = stop
    return GpuMatrix(format, codes, scales, table, rows, columns), views


def takes(weights: Sequence[object]) -> bool:
    """Whether kernels read these weights and they can be joined: one format, nf4 in its standard table and block."""
    if len({type(weight) for weight in weights}) != 1:
        return False
    for weight in weights:
        if isinstance(weight, Nf4Weight):
            if not weight.standard or len(weight.shape) != 2:
                return False
        elif isinstance(weight, Int8Weight):
            if len(weight.shape) != 2 or weight.shape[1] % 16:
                return False
        elif not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] % 8:
            return False
    return True


def _storage(weights: Sequence[AnyWeight]) -> tuple[int, Tensor, Tensor]:
    """(format, codes, scales) of the weights below each other."""
    if isinstance(weights[0], Nf4Weight):
        packed = [weight.packed for weight in weights if isinstance(weight, Nf4Weight)]
        maxima = [weight.maxima for weight in weights if isinstance(weight, Nf4Weight)]
        return NF4, _below(packed), _below(maxima)
    if isinstance(weights[0], Int8Weight):
        codes = [weight.codes for weight in weights if isinstance(weight, Int8Weight)]
        scales = [weight.scales for weight in weights if isinstance(weight, Int8Weight)]
        return INT8, _below(codes), _below(scales)
    values = _below([weight.detach() for weight in weights if isinstance(weight, Tensor)])
    return DENSE, values, values


def _below(tensors: list[Tensor]) -> Tensor:
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(tensors)
