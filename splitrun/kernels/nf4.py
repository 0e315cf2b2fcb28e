"""A weight in NF4: storage, products and look-ups. The format itself is in `nf4_definition`. Knows no models."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from splitrun.kernels.compiled import compiled_dequantize, compiled_product
from splitrun.kernels.gpu.library import usable
from splitrun.kernels.nf4_definition import BLOCK, NF4_TABLE, dequantize_reference, quantize_nf4
from splitrun.kernels.weight import Weight


class Nf4Weight(Weight):
    """A weight in NF4, or in another table of 16 entries and another block length as found in a checkpoint.

    packed  uint8 (*shape[:-1], shape[-1] / 2)
    maxima  fp32 (*shape[:-1], shape[-1] / block)
    table   fp32 (16,), or None for NF4's own
    """

    format = "nf4"

    def __init__(self, packed: Tensor, maxima: Tensor, dtype: torch.dtype, table: Tensor | None = None) -> None:
        self.packed = packed
        self.maxima = maxima
        self.table = table
        self.dtype = dtype
        self.device = packed.device
        self.shape = torch.Size((*packed.shape[:-1], packed.shape[-1] * 2))

    @classmethod
    def empty(cls, shape: Iterable[int], dtype: torch.dtype, device: torch.device | str) -> Nf4Weight:
        """Storage without values, to be filled by `store`."""
        *leading, width = shape
        packed = torch.empty(*leading, width // 2, dtype=torch.uint8, device=device)
        return cls(packed, torch.empty(*leading, width // BLOCK, dtype=torch.float32, device=device), dtype)

    @staticmethod
    def stored_bytes(shape: Iterable[int]) -> int:
        """Bytes of such a weight's storage."""
        return torch.Size(shape).numel() * (BLOCK // 2 + 4) // BLOCK

    def store(self, start: int, values: Tensor) -> None:
        """Quantize values into the entries from start along the first axis. Modifies the weight."""
        stop = start + values.shape[0]
        if values.device.type == "cuda" and usable(str(values.device)):
            from splitrun.kernels.gpu.quantize import nf4_into  # Triton is not everywhere

            nf4_into(values, self.packed[start:stop], self.maxima[start:stop])
        else:
            self.packed[start:stop], self.maxima[start:stop] = quantize_nf4(values)

    def moved(self, device: torch.device | str) -> Nf4Weight:
        """The same weight with its storage on a device."""
        table = None if self.table is None else self.table.to(device)
        return Nf4Weight(self.packed.to(device), self.maxima.to(device), self.dtype, table)

    @property
    def block(self) -> int:
        """Values that share a maximum."""
        return self.shape[-1] // self.maxima.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, maxima and a table of its own."""
        return self.packed.nbytes + self.maxima.nbytes + (0 if self.table is None else self.table.nbytes)

    def dequantize(self) -> Tensor:
        """All values in the compute dtype. Shape: ``shape``."""
        if self.standard:
            values = compiled_dequantize(self.packed, self.maxima, self.dtype)
            if values is not None:
                return values
        return dequantize_reference(self.packed, self.maxima, self._table(), self.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Entries along the first axis. Shape: (*ids.shape, *shape[1:])."""
        packed, maxima = self.packed[ids], self.maxima[ids]
        return Nf4Weight(packed, maxima, self.dtype, self.table).dequantize()

    def part(self, start: int, stop: int) -> Nf4Weight:
        """Entries start to stop, sharing the storage."""
        return Nf4Weight(self.packed[start:stop], self.maxima[start:stop], self.dtype, self.table)

    def entry(self, index: int) -> Nf4Weight:
        """One entry of a stack, sharing the storage."""
        return Nf4Weight(self.packed[index], self.maxima[index], self.dtype, self.table)

    def apply(self, x: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The product ``x @ W.T + bias``; on a GPU one row is multiplied without dequantizing to memory."""
        if self.device.type == "cuda" and x.numel() == x.shape[-1] and self.standard and x.dtype == self.dtype:
            product = compiled_product(x, self.packed, self.maxima)
            if product is not None:
                product = product if bias is None else product + bias
                return product if out is None else out.copy_(product)
        return super().apply(x, out, bias)

    @property
    def storage(self) -> tuple[Tensor, ...]:
        """Codes and maxima, of NF4's own table only."""
        return (self.packed, self.maxima) if self.table is None else ()

    @property
    def standard(self) -> bool:
        """Whether table and block are NF4's own."""
        return self.table is None and self.block == BLOCK

    def _table(self) -> Tensor:
        if self.table is None:
            return torch.tensor(NF4_TABLE, device=self.device)
        return self.table
