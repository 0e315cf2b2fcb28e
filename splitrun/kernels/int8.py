"""int8: symmetric, one fp32 scale per row. One byte a value and four a row.

Definition: scale = largest magnitude of the row times 1/127, code = value / scale rounded to even, value = code x
scale in fp32. The same codes and values on every device. This module knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from splitrun.kernels.gpu.library import usable
from splitrun.kernels.weight import Weight

INVERSE_127 = 1.0 / 127.0
CHUNK_VALUES = {"cpu": 1 << 18, "gpu": 1 << 21}
"""Values quantized at a time: temporaries stay small."""


def quantize_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales. Shape: (..., n) -> int8 (..., n), fp32 (...).

    The scale is a product, not a quotient: dividing by a constant rounds differently on CPU and GPU.
    """
    width = values.shape[-1]
    rows = values.reshape(-1, width)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=values.device)
    scales = torch.empty(rows.shape[0], dtype=torch.float32, device=values.device)
    step = max(1, CHUNK_VALUES["cpu" if values.device.type == "cpu" else "gpu"] // max(1, width))
    for start in range(0, rows.shape[0], step):
        chunk = rows[start : start + step].float()
        scale = chunk.abs().amax(-1) * INVERSE_127
        scales[start : start + step] = scale
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
        codes[start : start + step] = (chunk / divisor.unsqueeze(1)).round_().clamp_(-127, 127)
    return codes.view(values.shape), scales.view(values.shape[:-1])


class Int8Weight(Weight):
    """A weight in int8.

    codes   int8 (*shape)
    scales  fp32 (*shape[:-1])
    """

    format = "int8"

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.codes = codes
        self.scales = scales
        self.dtype = dtype
        self.device = codes.device
        self.shape = codes.shape

    @classmethod
    def empty(cls, shape: Iterable[int], dtype: torch.dtype, device: torch.device | str) -> Int8Weight:
        """Storage without values, to be filled by `store`."""
        *leading, width = shape
        codes = torch.empty(*leading, width, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(*leading, dtype=torch.float32, device=device), dtype)

    @staticmethod
    def stored_bytes(shape: Iterable[int]) -> int:
        """Bytes of such a weight's storage."""
        size = torch.Size(shape)
        return size.numel() + 4 * size[:-1].numel()

    def store(self, start: int, values: Tensor) -> None:
        """Quantize values into the entries from start along the first axis. Modifies the weight."""
        stop = start + values.shape[0]
        if values.device.type == "cuda" and usable(str(values.device)):
            from splitrun.kernels.gpu.quantize import int8_into  # Triton is not everywhere

            int8_into(values, self.codes[start:stop], self.scales[start:stop])
        else:
            self.codes[start:stop], self.scales[start:stop] = quantize_int8(values)

    def moved(self, device: torch.device | str) -> Int8Weight:
        """The same weight with its storage on a device."""
        return Int8Weight(self.codes.to(device), self.scales.to(device), self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def storage(self) -> tuple[Tensor, ...]:
        """Codes and scales."""
        return self.codes, self.scales

    def dequantize(self) -> Tensor:
        """All values in the compute dtype. Shape: ``shape``."""
        return self.codes.float().mul_(self.scales.unsqueeze(-1)).to(self.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Entries along the first axis. Shape: (*ids.shape, *shape[1:])."""
        return Int8Weight(self.codes[ids], self.scales[ids], self.dtype).dequantize()

    def part(self, start: int, stop: int) -> Int8Weight:
        """Entries start to stop, sharing the storage."""
        return Int8Weight(self.codes[start:stop], self.scales[start:stop], self.dtype)

    def entry(self, index: int) -> Int8Weight:
        """One entry of a stack, sharing the storage."""
        return Int8Weight(self.codes[index], self.scales[index], self.dtype)
