"""A weight on the CPU in the kernels' layout: nf4 or int8, for computing in bf16 or fp16.

Values and bytes are those of `Nf4Weight` and `Int8Weight`; only their order differs (see ``source/kernels.h``).
Products of up to 16 rows are the kernel's, those of more a prompt kernel's (`many`); without one, torch multiplies
values that are written tile by tile into memory that is used again. float32 keeps the plain formats and torch's exact
product. Knows no models.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from splitrun.kernels.cpu.arena import ARENA
from splitrun.kernels.cpu.library import DTYPES, FORMATS, MOST_ROWS, Kernel, Matrix
from splitrun.kernels.cpu.many import many_rows
from splitrun.kernels.int8 import Int8Weight
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.nf4_definition import BLOCK
from splitrun.kernels.weight import Weight

TILE = 16
LINE_COLUMNS = 4
"""Columns of an int8 line: a row's length is a multiple of it."""
NF4_BLOCK_BYTES = BLOCK // 2 + 4
"""Of a row: codes and a scale."""
SCRATCH_VALUES = 1 << 21
"""Values that a product of many rows has in memory at a time."""


class _Scratch(threading.local):
    """A thread's memory for values, used again by every product."""

    memory: Tensor | None = None

    def values(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        count = max(rows * columns, SCRATCH_VALUES)
        if self.memory is None or self.memory.dtype != dtype or self.memory.numel() < count:
            self.memory = torch.empty(count, dtype=dtype)
        return self.memory[: rows * columns].view(rows, columns)


_scratch = _Scratch()


class TiledWeight(Weight):
    """A matrix, or a stack of matrices whose rows are whole tiles.

    codes   uint8 (bytes,); those of nf4 with the scales among them
    scales  fp32 (rows,) of int8; none of nf4
    """

    def __init__(
        self, format: str, codes: Tensor, scales: Tensor, shape: Iterable[int], dtype: torch.dtype, kernel: Kernel
    ) -> None:
        self.format = format
        self.codes = codes
        self.scales = scales
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = codes.device
        self._kernel = kernel
        rows = self.shape[:-1].numel()
        self.matrix = Matrix(codes.data_ptr(), scales.data_ptr(), rows, self.shape[-1], FORMATS[format])

    @staticmethod
    def takes(format: str, shape: Iterable[int], dtype: torch.dtype, device: torch.device | str) -> bool:
        """Whether a weight of this shape can have this layout; others keep the plain one."""
        size = tuple(shape)
        if torch.device(device).type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or 0 in size:
            return False
        if len(size) not in (2, 3) or (len(size) == 3 and size[1] % TILE):
            return False
        return size[-1] % (BLOCK if format == "nf4" else LINE_COLUMNS) == 0

    @classmethod
    def empty(cls, format: str, shape: Iterable[int], dtype: torch.dtype, kernel: Kernel) -> TiledWeight:
        """Storage without values, to be filled by `store`."""
        size = torch.Size(shape)
        rows, nf4 = size[:-1].numel(), format == "nf4"
        codes = ARENA.empty(rows * (size[-1] // BLOCK * NF4_BLOCK_BYTES if nf4 else size[-1]), torch.uint8)
        scales = ARENA.empty(0 if nf4 else rows, torch.float32)
        return cls(format, codes, scales, size, dtype, kernel)

    @classmethod
    def of(cls, plain: Nf4Weight | Int8Weight, kernel: Kernel) -> TiledWeight:
        """A plain weight's codes and scales in this layout. The plain weight has the standard table and blocks."""
        weight = cls.empty(plain.format, plain.shape, plain.dtype, kernel)
        if isinstance(plain, Nf4Weight):
            weight._pack(0, plain.packed, plain.maxima)
        else:
            weight._pack(0, plain.codes, plain.scales)
        return weight

    def store(self, start: int, values: Tensor) -> None:
        """Quantize values into the entries from start along the first axis. Modifies the weight."""
        rows = values.reshape(-1, values.shape[-1])
        rows = rows.contiguous() if rows.dtype in DTYPES else rows.float().contiguous()
        self._kernel.quantize(self.matrix, start * self.shape[1:-1].numel(), rows)

    def _pack(self, first: int, codes: Tensor, scales: Tensor) -> None:
        flat = codes.reshape(-1, codes.shape[-1]).contiguous()
        self._kernel.pack(self.matrix, first, flat, scales.contiguous())

    def plain(self, start: int = 0, stop: int | None = None) -> Nf4Weight | Int8Weight:
        """A copy of some rows (of the whole, for a stack) in the plain format."""
        stop = self.shape[0] if stop is None else stop
        shape = (max(0, stop - start), *self.shape[1:])
        weight: Nf4Weight | Int8Weight
        if self.format == "nf4":
            weight = Nf4Weight.empty(shape, self.dtype, "cpu")
            codes, scales = weight.packed, weight.maxima
        else:
            weight = Int8Weight.empty(shape, self.dtype, "cpu")
            codes, scales = weight.codes, weight.scales
        if weight.numel():
            first = start * self.shape[1:-1].numel()
            self._kernel.unpack(self.matrix, first, codes.view(-1, codes.shape[-1]), scales)
        return weight

    def moved(self, device: torch.device | str) -> Weight:
        """Itself on the CPU; elsewhere the plain format."""
        return self if torch.device(device).type == "cpu" else self.plain().moved(device)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def storage(self) -> tuple[Tensor, ...]:
        """Codes and scales, or codes that have the scales among them."""
        return (self.codes, self.scales) if self.scales.numel() else (self.codes,)

    def dequantize(self) -> Tensor:
        """All values in the compute dtype. Shape: ``shape``."""
        values = torch.empty(self.shape, dtype=self.dtype)
        self._kernel.values(self.matrix, 0, values.view(-1, self.shape[-1]))
        return values

    def rows(self, ids: Tensor) -> Tensor:
        """Entries along the first axis. Shape: (*ids.shape, *shape[1:]). Raises IndexError."""
        flat = ids.reshape(-1).long()
        if self.ndim > 2:
            entries = [self.entry(int(index)).dequantize() for index in flat]
            return torch.stack(entries).view(*ids.shape, *self.shape[1:])
        values = torch.empty((flat.shape[0], self.shape[1]), dtype=self.dtype)
        try:
            self._kernel.gather(self.matrix, flat, values)
        except IndexError:  # ids from the end are rare, and looking for them costs as much as the rows
            if not bool((flat < 0).any()):
                raise
            self._kernel.gather(self.matrix, torch.where(flat < 0, flat + self.shape[0], flat), values)
        return values.view(*ids.shape, self.shape[1])

    def part(self, start: int, stop: int) -> Weight:
        """Entries start to stop, sharing the storage; a copy where a tile would be cut."""
        whole = start < stop and (self.ndim > 2 or (start % TILE == 0 and (stop % TILE == 0 or stop == self.shape[0])))
        return self._view(start, stop, (stop - start, *self.shape[1:])) if whole else self.plain(start, stop)

    def entry(self, index: int) -> TiledWeight:
        """One entry of a stack, sharing the storage."""
        return self._view(index, index + 1, self.shape[1:])

    def _view(self, start: int, stop: int, shape: Iterable[int]) -> TiledWeight:
        codes, scales = self.codes.view(-1), self.scales.view(-1)
        per_code, per_scale = codes.numel() // self.shape[0], scales.numel() // self.shape[0]
        codes, scales = codes[start * per_code : stop * per_code], scales[start * per_scale : stop * per_scale]
        return TiledWeight(self.format, codes, scales, shape, self.dtype, self._kernel)

    def apply(self, x: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The product ``x @ W.T + bias``: row-invariant and with rounded activations for up to 16 rows."""
        rows, columns = self.shape
        count = x.numel() // columns
        if x.dtype != self.dtype or x.shape[-1] != columns or x.device.type != "cpu" or not count:
            return super().apply(x, out, bias)
        product = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
        if count <= MOST_ROWS:
            same = None if bias is None else bias.to(x.dtype).contiguous()
            self._kernel.product(self.matrix, x.reshape(count, columns).contiguous(), product, same)
        elif (many := many_rows()) is not None and many.takes(x.dtype):
            same = None if bias is None else bias.to(x.dtype).contiguous()
            many.product(self.matrix, x.reshape(count, columns).contiguous(), product, same)
        else:
            self._apply_in_tiles(x, product, bias)
        return product if out is None else out.copy_(product)

    def largest(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Per row the largest entry of `apply`'s result, as fp32, and the lowest index that has it; NaN is largest.

        None where `apply` would not use the kernel for each row. Shape: (rows, in) -> (rows,), int64 (rows,).
        """
        if x.dtype != self.dtype or not 0 < x.shape[0] <= MOST_ROWS or x.shape[1:] != self.shape[1:]:
            return None
        return self._kernel.choose(self.matrix, x.contiguous())

    def _apply_in_tiles(self, x: Tensor, product: Tensor, bias: Tensor | None) -> None:
        rows, columns = self.shape
        step = max(TILE, SCRATCH_VALUES // columns // TILE * TILE)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            values = _scratch.values(stop - start, columns, self.dtype)
            self._kernel.values(self.matrix, start, values)
            part_bias = None if bias is None else bias[start:stop]
            product[..., start:stop] = functional.linear(x, values, part_bias)
