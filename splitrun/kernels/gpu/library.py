"""Whether the GPU kernels can be used on a device: Triton is there, and the device's capability is enough.

Knows no weights and no models.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

LEAST_CAPABILITY = (7, 0)
"""What Triton's compiler needs of an NVIDIA card."""


@cache
def usable(device: str) -> bool:
    """Whether the kernels run on a torch device; SPLITRUN_GPU_KERNELS=0 says no everywhere."""
    if os.environ.get("SPLITRUN_GPU_KERNELS") == "0" or importlib.util.find_spec("triton") is None:
        return False
    where = torch.device(device)
    if where.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(where) >= LEAST_CAPABILITY
