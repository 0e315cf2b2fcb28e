"""What is multiplied but is not a plain tensor: the `Weight`, and how it takes the place of a module's parameter.

A `Weight` stands where a Parameter stood, so the model's own code runs untouched: torch hands every function that meets
one to ``Weight.__torch_function__``. Products and embedding look-ups go to the format's own code; whatever else a model
does with a weight (a transpose, a batched product) sees the dequantized values. This module knows no format and no
model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

DEQUANTIZED_VALUES = {"cpu": 1 << 22, "gpu": 1 << 23}
"""Values that a product dequantizes at a time, so that no product needs more memory than this many values."""


class Weight(ABC):
    """A matrix (out, in), or a stack of them (experts, rows, columns), in a storage format.

    format  name of the format, as in a placement
    shape   shape of the values, not of the storage
    dtype   the compute dtype: type of what `dequantize`, `rows` and `apply` return
    device  where the storage lies
    nbytes  bytes of the storage
    """

    format: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad = False
    is_meta = False

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the storage occupies."""

    @property
    def storage(self) -> tuple[Tensor, ...]:
        """All that the weight consists of, contiguous: with its class, format, dtype and shape it is the weight.

        Empty where there is more to it; such weights are not kept on disk.
        """
        return ()

    @abstractmethod
    def dequantize(self) -> Tensor:
        """All values in the compute dtype. Shape: ``shape``. A fresh tensor: the storage is not modified."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Entries along the first axis, dequantizing only those. Shape: (*ids.shape, *shape[1:])."""

    @abstractmethod
    def part(self, start: int, stop: int) -> Weight:
        """Entries start to stop along the first axis, sharing the storage. Shape: (stop - start, *shape[1:])."""

    @abstractmethod
    def entry(self, index: int) -> Weight:
        """One entry of a stack, sharing the storage. Only for more than two axes. Shape: shape[1:]."""

    @abstractmethod
    def store(self, start: int, values: Tensor) -> None:
        """Set the entries from start along the first axis to values of any floating type. Modifies the weight."""

    @abstractmethod
    def moved(self, device: torch.device | str) -> Weight:
        """The same weight with its storage on a device; itself when it is there already."""

    def apply(self, x: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The product ``x @ W.T + bias``. Shape: (..., in) -> (..., out). ``out``, when given, receives the result.

        Like torch, it asks that ``x`` has the compute dtype and lies on the same device.
        """
        step = max(1, DEQUANTIZED_VALUES["cpu" if self.device.type == "cpu" else "gpu"] // self.shape[1])
        if self.shape[0] <= step:
            product = functional.linear(x, self.dequantize(), bias)
            return product if out is None else out.copy_(product)
        if out is None:
            out = x.new_empty(*x.shape[:-1], self.shape[0])
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            part_bias = None if bias is None else bias[start:stop]
            out[..., start:stop] = functional.linear(x, self.part(start, stop).dequantize(), part_bias)
        return out

    def __getitem__(self, index: Any) -> Any:
        """An int or slice along the first axis shares the storage; a tensor of ids gathers; others dequantize."""
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(self.shape[0])
            return self.part(start, max(start, stop))
        if isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool:
            index = int(index)
        if isinstance(index, int):
            if not -self.shape[0] <= index < self.shape[0]:
                raise IndexError(f"index {index} is out of range for {self.shape[0]} entries")
            index %= self.shape[0]
            return self.entry(index) if self.ndim > 2 else self.rows(torch.tensor([index], device=self.device))[0]
        if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64):
            return self.rows(index)
        return self.dequantize()[index]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def dim(self) -> int:
        """Number of axes, as Tensor.dim."""
        return len(self.shape)

    def size(self, axis: int | None = None) -> torch.Size | int:
        """The shape or one of its lengths, as Tensor.size."""
        return self.shape if axis is None else self.shape[axis]

    def numel(self) -> int:
        """Number of values."""
        return self.shape.numel()

    @property
    def data(self) -> Weight:
        """Itself: a weight has no gradient to be detached from."""
        return self

    def detach(self) -> Weight:
        """Itself."""
        return self

    def contiguous(self) -> Weight:
        """Itself."""
        return self

    def to(self, *arguments: Any, **keywords: Any) -> Any:
        """Itself when nothing changes, else the dequantized values so converted, as Tensor.to."""
        values = [*arguments, *keywords.values()]
        wanted = [value for value in values if not isinstance(value, bool)]
        if all(
            isinstance(value, torch.dtype | torch.device) and value in (self.dtype, self.device) for value in wanted
        ):
            return self
        return self.dequantize().to(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("format", "shape", "dtype", "device"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        return getattr(self.dequantize(), name)

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self.dequantize(), other)

    def __mul__(self, other: Any) -> Tensor:
        return torch.mul(self.dequantize(), other)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Tensor:
        return torch.add(self.dequantize(), other)

    __radd__ = __add__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.format}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        arguments: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a torch function that met a Weight among its arguments."""
        keywords = keywords or {}
        if function is functional.linear:
            return _linear(*arguments, **keywords)
        if function is functional.embedding:
            return _embedding(*arguments, **keywords)
        plain = {name: _dequantized(value) for name, value in keywords.items()}
        return function(*(_dequantized(value) for value in arguments), **plain)


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    if isinstance(weight, Weight) and isinstance(input, Tensor):
        return weight.apply(input, bias=_dequantized(bias))
    return functional.linear(_dequantized(input), _dequantized(weight), _dequantized(bias))


def _embedding(input: Tensor, weight: Any, *arguments: Any, **keywords: Any) -> Tensor:
    if isinstance(weight, Weight) and not keywords.get("max_norm"):
        return weight.rows(input)
    return functional.embedding(input, _dequantized(weight), *arguments, **keywords)


def _dequantized(value: Any) -> Any:
    if isinstance(value, Weight):
        return value.dequantize()
    if isinstance(value, list | tuple):
        return type(value)(_dequantized(item) for item in value)
    return value


def install(module: torch.nn.Module, name: str, value: Weight | Tensor) -> None:
    """Put a value where the module has a parameter or buffer of that name (dotted names reach into submodules).

    A Weight becomes a plain attribute, so that moving or casting the module leaves it alone; a tensor becomes a
    parameter without gradient, or stays a buffer where it was one. Modifies the module.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path) if path else module
    if leaf in owner._buffers and not isinstance(value, Weight):
        owner._buffers[leaf] = value
        return
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    owner.__dict__.pop(leaf, None)
    if isinstance(value, Weight):
        owner.__dict__[leaf] = value
    else:
        parameter = value if isinstance(value, torch.nn.Parameter) else torch.nn.Parameter(value, requires_grad=False)
        owner.register_parameter(leaf, parameter)
