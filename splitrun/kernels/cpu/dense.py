"""A matrix in bf16 or fp16 on the CPU, stored as torch stores it: products of few rows in C, of many by torch.

Products of up to 16 rows are fp32 sums in an order of their own, so that a row's bits depend on that row alone; torch's
own depend on how many there are. The order is the one that `reference.dense_reference` defines, but for bf16 at a level
with `Kernel.dots`. Knows no models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from splitrun.kernels.cpu.arena import ARENA
from splitrun.kernels.cpu.library import FORMATS, MOST_ROWS, Kernel, Matrix
from splitrun.kernels.weight import Weight

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class DenseWeight(Weight):
    """A matrix. values: Shape (out, in), contiguous, shared with whoever gave it."""

    def __init__(self, values: Tensor, kernel: Kernel) -> None:
        assert self.takes(values), "no matrix of a 16-bit type on the CPU"
        self.values = values
        self.format = NAMES[values.dtype]
        self.shape = values.shape
        self.dtype = values.dtype
        self.device = values.device
        self._kernel = kernel
        self.matrix = Matrix(values.data_ptr(), None, *values.shape, FORMATS[self.format])

    @classmethod
    def on_huge_pages(cls, values: Tensor, kernel: Kernel) -> DenseWeight:
        """A copy where reading is fastest."""
        copy = ARENA.empty(values.numel(), values.dtype).view(values.shape)
        return cls(copy.copy_(values), kernel)

    @staticmethod
    def takes(values: Tensor) -> bool:
        """Whether a tensor can be such a weight."""
        return values.ndim == 2 and values.dtype in NAMES and values.device.type == "cpu" and values.is_contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes

    def dequantize(self) -> Tensor:
        """A copy of the values."""
        return self.values.clone()

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows. Shape: (*ids.shape, in)."""
        return self.values[ids]

    def part(self, start: int, stop: int) -> DenseWeight:
        """Rows start to stop, sharing the storage."""
        return DenseWeight(self.values[start:stop], self._kernel)

    def entry(self, index: int) -> Weight:
        """A matrix has no entries: raises TypeError."""
        raise TypeError("a matrix is no stack of weights")

    def store(self, start: int, values: Tensor) -> None:
        """Replace rows from start on. Modifies the weight."""
        self.values[start : start + values.shape[0]] = values

    def moved(self, device: torch.device | str) -> Weight:
        """Itself: such a weight is for the CPU. Raises ValueError for another device."""
        if torch.device(device).type != "cpu":
            raise ValueError("a dense weight of the CPU kernels stays on the CPU")
        return self

    def apply(self, x: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The product ``x @ W.T + bias``: row-invariant for up to 16 rows, torch's for more."""
        rows, columns = self.shape
        count = x.numel() // columns
        if x.dtype != self.dtype or x.shape[-1] != columns or not 0 < count <= MOST_ROWS:
            product = functional.linear(x, self.values, bias)
        else:
            product = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
            same = None if bias is None else bias.to(x.dtype).contiguous()
            self._kernel.product(self.matrix, x.reshape(count, columns).contiguous(), product, same)
        return product if out is None else out.copy_(product)

    def largest(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """As `TiledWeight.largest`."""
        if x.dtype != self.dtype or not 0 < x.shape[0] <= MOST_ROWS or x.shape[1:] != self.shape[1:]:
            return None
        return self._kernel.choose(self.matrix, x.contiguous())
