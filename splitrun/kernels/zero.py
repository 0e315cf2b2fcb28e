"""A weight of no memory whose products are zeros: for tracing a model of real size without its weights.

Shapes are worked out on the meta device, so nothing is multiplied. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_map

from splitrun.kernels.weight import Weight


class ZeroWeight(Weight):
    """Zeros of any shape. Transposes, reshapes and slices of it are again ZeroWeights."""

    format = "zero"

    def __init__(self, shape: Iterable[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = torch.device(device)

    @property
    def nbytes(self) -> int:
        """None are stored."""
        return 0

    def dequantize(self) -> Tensor:
        """Zeros that share one value. Shape: ``shape``."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)

    def rows(self, ids: Tensor) -> Tensor:
        """Zeros. Shape: (*ids.shape, *shape[1:])."""
        return torch.zeros(*ids.shape, *self.shape[1:], dtype=self.dtype, device=self.device)

    def part(self, start: int, stop: int) -> ZeroWeight:
        """Zeros of that many entries."""
        return ZeroWeight((stop - start, *self.shape[1:]), self.dtype, self.device)

    def entry(self, index: int) -> ZeroWeight:
        """Zeros of one entry."""
        return ZeroWeight(self.shape[1:], self.dtype, self.device)

    def store(self, start: int, values: Tensor) -> None:
        """Forget the values."""

    def moved(self, device: torch.device | str) -> ZeroWeight:
        """The same zeros elsewhere."""
        return ZeroWeight(self.shape, self.dtype, device)

    def apply(self, x: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Zeros, or the bias. Shape: (..., in) -> (..., out)."""
        product = torch.zeros(*x.shape[:-1], self.shape[0], dtype=x.dtype, device=x.device)
        if bias is not None:
            product += bias
        return product if out is None else out.copy_(product)

    def __getitem__(self, index: Any) -> Any:
        """Ids of a stack give a ZeroWeight too: gathered experts cost nothing either."""
        if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64) and index.ndim and self.ndim > 2:
            return ZeroWeight((*index.shape, *self.shape[1:]), self.dtype, self.device)
        return super().__getitem__(index)

    def to(self, *arguments: Any, **keywords: Any) -> Any:
        """Zeros of the wanted type and place."""
        target = torch.empty(0, dtype=self.dtype, device=self.device).to(*arguments, **keywords)
        return ZeroWeight(self.shape, target.dtype, target.device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("format", "shape", "dtype", "device"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        attribute = getattr(self._meta(), name)
        if not callable(attribute) or isinstance(attribute, Tensor):
            return self._of_shape(attribute)
        return lambda *arguments, **keywords: self._of_shape(attribute(*arguments, **keywords))

    def __matmul__(self, other: Tensor) -> Tensor:
        result: Tensor = self.__torch_function__(torch.matmul, (), (self, other))
        return result

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        arguments: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        """Products and look-ups as every Weight; any other function gives zeros of the shape that it would give."""
        name = getattr(function, "__name__", "")
        writes = (name.endswith("_") and not name.endswith("__")) or "out" in (keywords or {})
        if writes or function in (torch.nn.functional.linear, torch.nn.functional.embedding):
            return super().__torch_function__(function, types, arguments, keywords)
        call = (arguments, dict(keywords or {}))
        device = _device_of(call)
        on_meta = tree_map(_to_meta, call)
        result = function(*on_meta[0], **on_meta[1])
        if not tree_any(lambda value: isinstance(value, Tensor) and not isinstance(value, Weight), call):
            return tree_map(lambda value: _zero_weight(value, device), result)
        return tree_map(
            lambda value: torch.zeros_like(value, device=device) if isinstance(value, Tensor) else value, result
        )

    def _meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def _of_shape(self, value: Any) -> Any:
        return tree_map(lambda leaf: _zero_weight(leaf, self.device), value)


def _zero_weight(value: Any, device: torch.device) -> Any:
    return ZeroWeight(value.shape, value.dtype, device) if isinstance(value, Tensor) else value


def _to_meta(value: Any) -> Any:
    if isinstance(value, Weight):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value.to("meta") if isinstance(value, Tensor) else value


def _device_of(call: Any) -> torch.device:
    found: list[torch.device] = []
    tree_map(lambda value: found.append(value.device) if isinstance(value, Weight) else None, call)
    return found[0]
