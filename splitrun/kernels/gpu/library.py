"""Whether the GPU kernels can be used on a device: Triton is there, and the device's capability is enough; its errors.

Knows no weights and no models.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from typing import Any

import torch

LEAST_CAPABILITY = (7, 0)
"""What Triton's compiler needs of an NVIDIA card."""
AMPERE = (8, 0)
"""From this compute capability on a multiprocessor has 99 KiB of shared memory and more for a block, before 64."""
USUAL_WIDTH, MOST_WIDTH = 128, 256
"""Of heads: what every card has room for, and what those of 99 KiB have."""


@cache
def usable(device: str) -> bool:
    """Whether the kernels run on a torch device; SPLITRUN_GPU_KERNELS=0 says no everywhere."""
    if os.environ.get("SPLITRUN_GPU_KERNELS") == "0" or importlib.util.find_spec("triton") is None:
        return False
    where = torch.device(device)
    if where.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(where) >= LEAST_CAPABILITY


def widest(device: torch.device) -> int:
    """The widest heads that a device has room for."""
    if device.type != "cuda":
        return MOST_WIDTH  # interpreted
    roomy = torch.version.hip is None and torch.cuda.get_device_capability(device) >= AMPERE
    return MOST_WIDTH if roomy else USUAL_WIDTH


def or_compiler_errors(*kinds: type[Exception]) -> tuple[type[Exception], ...]:
    """Those, and what Triton raises of kernels that do not compile or that a device has no room for, which is none of
    Python's own kinds."""
    errors: Any = sys.modules.get("triton.errors")
    return kinds if errors is None else (*kinds, errors.TritonError)
