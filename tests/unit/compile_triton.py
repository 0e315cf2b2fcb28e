"""Compile every Triton kernel that a card's stage launches, for a card that is not here; print their names.

Run by `test_triton_compiles.py` in a process of its own: the interpreter of `test_card.py` replaces the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

AMPERE = GPUTarget("cuda", 80, 32)


class NoDevice:
    """What the compiler asks of a driver, without one."""

    def get_current_target(self) -> GPUTarget:
        return AMPERE

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiling(seen: set[str]) -> Callable[..., None]:
    """A kernel's launch that ends with its compilation."""
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        for assembly in {bool(kwargs.get("ASSEMBLY")), "ASSEMBLY" in kwargs}:
            own = {**kwargs, "ASSEMBLY": assembly} if "ASSEMBLY" in kwargs else kwargs
            launch(self, *args, grid=grid, warmup=True, **own)
        seen.add(self.fn.__name__)

    return run


def main() -> None:
    seen: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        triton.runtime.driver.set_active(NoDevice())
        patch.setattr(JITFunction, "run", compiling(seen))
        from test_card import make, tokens

        from splitrun.kernels.gpu import matrix, unpack

        for format in ("dense", "int8", "nf4"):
            run = make("qwen3", format, "bf16", patch)
            run.feed({0: tokens(26, 1), 1: tokens(5, 2)})
            run.feed({0: tokens(1, 3)})
        memory, scales = torch.zeros(64 * 64, dtype=torch.bfloat16), torch.zeros(64)
        for kind, width, values in ((matrix.TILED_INT8, 64, torch.int8), (matrix.TILED_NF4, 36, torch.uint8)):
            part = matrix.Part(torch.zeros((64, width), dtype=values), scales)
            tiled = matrix.GpuMatrix(kind, (part,), 64, matrix.nf4_table(torch.device("cpu")))
            unpack.unpacked(tiled, part, 0, 64, memory)
    print(*sorted(seen))


if __name__ == "__main__":
    main()
