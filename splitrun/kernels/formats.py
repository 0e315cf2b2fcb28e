"""The table of weight formats: their bytes, their classes, and which tensors a format covers.

A format covers the weights of linear layers (nn.Linear and GPT-2's Conv1D), embedding tables of tokens, the output
head, and stacks of expert matrices; nf4 only where a row is a multiple of 64 values. Everything else keeps the compute
dtype: norms, biases, convolutions, position tables, routers, and what nf4 cannot divide. This module knows modules by
their type only; which embedding holds positions and how many experts there are, its caller says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from splitrun.kernels.cpu.library import kernel
from splitrun.kernels.cpu.tiled import TiledWeight
from splitrun.kernels.int8 import Int8Weight
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.nf4_definition import BLOCK
from splitrun.kernels.weight import Weight

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dense formats: a plain tensor of that type."""


@dataclass(frozen=True)
class QuantizedFormat:
    """A format whose tensors are a `Weight`: in the compiled kernels' layout where they multiply, else plain."""

    name: str
    plain: type[Nf4Weight] | type[Int8Weight]

    def empty(self, shape: Iterable[int], dtype: torch.dtype, device: torch.device | str) -> Weight:
        """Storage without values, to be filled by `Weight.store`."""
        size = torch.Size(shape)
        if TiledWeight.takes(self.name, size, dtype, device) and (fast := kernel()) is not None:
            return TiledWeight.empty(self.name, size, dtype, fast)
        return self.plain.empty(size, dtype, device)

    def stored_bytes(self, shape: Iterable[int]) -> int:
        """Bytes of a weight of this shape, in either layout."""
        return self.plain.stored_bytes(shape)


QUANTIZED = {"int8": QuantizedFormat("int8", Int8Weight), "nf4": QuantizedFormat("nf4", Nf4Weight)}
"""Quantized formats."""


def applied_format(shape: Iterable[int], format: str, covered: bool = True) -> str | None:
    """The quantized format that a tensor of this shape really gets; None: it stays in the compute dtype."""
    size = tuple(shape)
    if format not in QUANTIZED or not covered or len(size) < 2:
        return None
    return None if format == "nf4" and size[-1] % BLOCK else format


def weight_bytes(
    shape: Iterable[int], format: str, compute_dtype: str | torch.dtype = torch.bfloat16, covered: bool = True
) -> int:
    """Bytes that a tensor of this shape occupies when loaded in a format.

    A dense format is its own type; under a quantized one, what it does not cover is kept in ``compute_dtype``.
    """
    size = torch.Size(shape)
    quantized = applied_format(size, format, covered)
    if quantized is not None:
        return QUANTIZED[quantized].stored_bytes(size)
    dtype = DTYPES.get(format) or (DTYPES[compute_dtype] if isinstance(compute_dtype, str) else compute_dtype)
    return size.numel() * dtype.itemsize


def quantize(tensor: Tensor, format: str, compute_dtype: torch.dtype) -> Weight | Tensor:
    """The tensor in a format, on its device; a plain tensor of the compute dtype where the format does not apply."""
    quantized = applied_format(tensor.shape, format)
    if quantized is None:
        return tensor.to(compute_dtype)
    weight = QUANTIZED[quantized].empty(tensor.shape, compute_dtype, tensor.device)
    weight.store(0, tensor)
    return weight


def placed(weight: Weight, device: torch.device | str) -> Weight:
    """The weight on a device, in the layout that multiplies fastest there."""
    moved = weight.moved(device)
    if not isinstance(moved, Nf4Weight | Int8Weight) or (isinstance(moved, Nf4Weight) and not moved.standard):
        return moved
    if not TiledWeight.takes(moved.format, moved.shape, moved.dtype, device) or (fast := kernel()) is None:
        return moved
    return TiledWeight.of(moved, fast)


def covered(
    module: nn.Module,
    attribute: str,
    tensor: Tensor | Weight,
    experts: Collection[int] = (),
    tokens: nn.Module | None = None,
) -> bool:
    """Whether quantized formats cover a module's parameter.

    ``experts`` holds the model's numbers of experts: a linear layer of exactly that many outputs is a router. With
    ``tokens`` given, that is the one embedding table which counts; without, every table does.
    """
    if attribute in module._buffers:
        return False
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        outputs = tensor.shape[0] if isinstance(module, nn.Linear) else tensor.shape[-1]
        return attribute == "weight" and tensor.ndim == 2 and outputs > 1 and outputs not in experts
    if isinstance(module, nn.Embedding):
        return attribute == "weight" and (tokens is None or module is tokens)
    if isinstance(module, nn.modules.conv._ConvNd) or tensor.ndim != 3:
        return False
    return min(tensor.shape[1:]) > 1 and (not experts or tensor.shape[0] in experts)
