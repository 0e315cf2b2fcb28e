"""Compile every Triton kernel that a card's stage launches, for cards that are not here; print the bytes of shared
memory that each takes at most.

    python compile_triton.py CAPABILITY,TYPE,HEAD_WIDTH,FORMAT... ...

All kernels for the first card, those of attention for the others.

Run by `test_triton_compiles.py` in a process of its own: the interpreter of `test_card.py` replaces the compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ATTENTION = ("_prompt", "_decode")


class NoDevice:
    """What the compiler asks of a driver, without one."""

    capability = 80

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # of each the compiler asks for the target once

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiling(seen: dict[str, int], wanted: Collection[str]) -> Callable[..., None]:
    """A launch that ends with the kernel's compilation, if it is wanted; name -> most bytes of shared memory."""
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = self.fn.__name__
        if wanted and name not in wanted:
            return
        for assembly in {bool(kwargs.get("ASSEMBLY")), "ASSEMBLY" in kwargs}:
            own = {**kwargs, "ASSEMBLY": assembly} if "ASSEMBLY" in kwargs else kwargs
            compiled = launch(self, *args, grid=grid, warmup=True, **own)
            seen[name] = max(seen.get(name, 0), compiled.metadata.shared)

    return run


def compiled(wanted: Collection[str], capability: str, dtype: str, width: str, *formats: str) -> dict[str, int]:
    """Kernel -> the most bytes of shared memory that it takes; of those that are wanted, or all."""
    seen: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoDevice, "capability", int(capability))
        patch.setattr(JITFunction, "run", compiling(seen, wanted))
        from test_card import SIZES, make, tokens

        from splitrun.kernels.gpu import matrix, unpack

        patch.setitem(SIZES, "head_dim", int(width))
        for format in formats:
            run = make("qwen3", format, dtype, patch)
            run.feed({0: tokens(26, 1), 1: tokens(5, 2)})
            run.feed({0: tokens(1, 3)})
        memory, scales = torch.zeros(64 * 64, dtype=torch.bfloat16), torch.zeros(64)
        for kind, width, values in ((matrix.TILED_INT8, 64, torch.int8), (matrix.TILED_NF4, 36, torch.uint8)):
            part = matrix.Part(torch.zeros((64, width), dtype=values), scales)
            tiled = matrix.GpuMatrix(kind, (part,), 64, matrix.nf4_table(torch.device("cpu")))
            unpack.unpacked(tiled, part, 0, 64, memory)
    return seen


def main() -> None:
    triton.runtime.driver.set_active(NoDevice())
    for number, card in enumerate(sys.argv[1:]):
        for name, size in compiled(ATTENTION if number else (), *card.split(",")).items():
            print(card, name, size)


if __name__ == "__main__":
    main()
