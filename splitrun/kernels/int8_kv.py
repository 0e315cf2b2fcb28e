"""Keys and values in int8: the definition that the compiled kernels store and read, in plain torch.

Each head's key, and each value, of a token has one scale in fp32: its largest magnitude / 127; codes are values by
scale, rounded to even. So a value is off by at most its vector's largest magnitude / 254, beside fp32 rounding. A
vector that is not finite has the scale NaN: it is visible in every token that attends to it. Knows no blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-30
"""A vector without a larger magnitude has codes of zero."""


def quantize_kv(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales. Shape: (..., width) -> int8 same, fp32 (...)."""
    values = vectors.float()
    largest, finite = values.abs().amax(-1), values.isfinite().all(-1)
    used = finite & (largest > SMALLEST)
    inverse = torch.where(used, torch.tensor(127.0, device=values.device) / largest, 0.0).unsqueeze(-1)
    codes = (torch.where(used.unsqueeze(-1), values, 0.0) * inverse).round().to(torch.int8)
    unit = torch.tensor(1.0, device=values.device) / 127.0
    return codes, torch.where(finite, largest * unit, torch.nan)


def dequantize_kv(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, rounded to a type. Shape: int8 (..., width), fp32 (...) -> (..., width)."""
    return (codes.float() * scales.unsqueeze(-1)).to(dtype)
