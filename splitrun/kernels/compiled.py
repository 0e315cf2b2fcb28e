"""bitsandbytes' compiled NF4 code where this machine has it: imported on first use, silently, and tested before trust.

Each function returns None where the library is absent, was built without this kind of device, or gives other values
than the definition; the caller then uses its plain torch reference. This module knows no weights and no models.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from splitrun.kernels.nf4_definition import BLOCK, NF4_TABLE, dequantize_reference


@cache
def _library() -> Any:
    """bitsandbytes, or None where it cannot be imported.

    On some CPUs its import fetches a kernel from the Hub through the package ``kernels``; hiding that package keeps
    the import offline. The library then uses its own.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    modules: dict[str, Any] = sys.modules
    hidden = "kernels" not in modules
    if hidden:
        modules["kernels"] = None
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("bitsandbytes.functional")
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
    finally:
        logger.setLevel(level)
        if hidden:
            del modules["kernels"]


@cache
def _trusted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library runs on this device and returns exactly the defined values."""
    if _library() is None or device.type not in ("cpu", "cuda"):
        return False
    native = importlib.import_module("bitsandbytes.cextension")
    if isinstance(native.lib, native.ErrorHandlerMockBNBNativeLibrary):
        return False
    if device.type == "cuda" and not native.lib.compiled_with_cuda:
        return False
    # every byte, under maxima of all sizes: some builds round half-precision values of small size wrongly
    packed = torch.arange(256, dtype=torch.int32).repeat(64).to(torch.uint8).view(256, 64).to(device)
    maxima = (2.0 ** torch.linspace(-30, 14, 512)).view(256, 2).to(device)
    expected = dequantize_reference(packed, maxima, torch.tensor(NF4_TABLE, device=device), dtype)
    try:
        return torch.equal(_dequantize(packed, maxima, dtype), expected)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False


def _dequantize(packed: Tensor, maxima: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    operation = torch.ops.bitsandbytes.dequantize_4bit.default
    flat = packed.reshape(-1, 1)
    values: Tensor = operation(flat, maxima.reshape(-1), BLOCK, "nf4", shape, dtype)
    return values.view(shape)


def compiled_dequantize(packed: Tensor, maxima: Tensor, dtype: torch.dtype) -> Tensor | None:
    """NF4 values of packed codes. Shape: uint8 (..., n / 2), fp32 (..., n / 64) -> (..., n)."""
    if not _trusted(packed.device, dtype) or not packed.numel():
        return None
    return _dequantize(packed.contiguous(), maxima.contiguous(), dtype)


@cache
def _code(device: torch.device) -> Tensor:
    return torch.tensor(NF4_TABLE, device=device)


def compiled_product(x: Tensor, packed: Tensor, maxima: Tensor) -> Tensor | None:
    """One row times NF4 codes on a GPU. Shape: (..., in) with one row, uint8 (out, in / 2) -> (..., out)."""
    if packed.ndim != 2 or not _trusted(packed.device, x.dtype):
        return None
    shape = (packed.shape[0], packed.shape[1] * 2)
    operation = torch.ops.bitsandbytes.gemv_4bit.default
    row = x.reshape(1, -1).contiguous()
    product: Tensor = operation(row, packed.reshape(-1, 1), shape, maxima.reshape(-1), _code(x.device), BLOCK)
    return product.view(*x.shape[:-1], shape[0])
