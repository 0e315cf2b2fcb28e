"""Compile every Triton kernel that a card's stage launches, for a card that is not here; print the bytes of shared
memory that each takes at most.

    python compile_triton.py CAPABILITY TYPE HEAD_WIDTH FORMAT...

Run by `test_triton_compiles.py` in a process of its own: the interpreter of `test_card.py` replaces the compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class NoDevice:
    """What the compiler asks of a driver, without one."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiling(seen: dict[str, int]) -> Callable[..., None]:
    """A kernel's launch that ends with its compilation; name -> most bytes of shared memory."""
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        for assembly in {bool(kwargs.get("ASSEMBLY")), "ASSEMBLY" in kwargs}:
            own = {**kwargs, "ASSEMBLY": assembly} if "ASSEMBLY" in kwargs else kwargs
            compiled = launch(self, *args, grid=grid, warmup=True, **own)
            name = self.fn.__name__
            seen[name] = max(seen.get(name, 0), compiled.metadata.shared)

    return run


def main() -> None:
    capability, dtype, width, *formats = sys.argv[1:]
    seen: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        triton.runtime.driver.set_active(NoDevice(int(capability)))
        patch.setattr(JITFunction, "run", compiling(seen))
        from test_card import SIZES, make, tokens

        from splitrun.kernels.gpu import matrix, unpack

        SIZES["head_dim"] = int(width)
        for format in formats:
            run = make("qwen3", format, dtype, patch)
            run.feed({0: tokens(26, 1), 1: tokens(5, 2)})
            run.feed({0: tokens(1, 3)})
        memory, scales = torch.zeros(64 * 64, dtype=torch.bfloat16), torch.zeros(64)
        for kind, width, values in ((matrix.TILED_INT8, 64, torch.int8), (matrix.TILED_NF4, 36, torch.uint8)):
            part = matrix.Part(torch.zeros((64, width), dtype=values), scales)
            tiled = matrix.GpuMatrix(kind, (part,), 64, matrix.nf4_table(torch.device("cpu")))
            unpack.unpacked(tiled, part, 0, 64, memory)
    print(*(f"{name} {size}" for name, size in sorted(seen.items())), sep="\n")


if __name__ == "__main__":
    main()
