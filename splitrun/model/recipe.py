"""How one or more tensors of a module are made from tensors on disk: a plain copy, or transformers' own conversion.

A recipe yields its results piece by piece along the first axis where it can (rows of a copied tensor, single experts of
a stack), so that loading never holds a second full copy. Knows nothing of formats and devices.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from splitrun.errors import UnsupportedModel
from splitrun.model.source import WeightSource

PIECE_BYTES = 4 << 20
"""Bytes read at a time from a tensor that is copied. Larger pieces load no faster but leave holes in the heap."""


@dataclass(eq=False)
class Recipe:
    """The tensors ``targets`` (name -> shape) of a module, made from tensors on disk.

    ``inputs`` maps each pattern of the converter to the names on disk that it collected, in order; without a
    ``converter`` there is one input and one target, and the input is copied.
    """

    key: str
    converter: Any = None
    inputs: dict[str, list[str]] = field(default_factory=dict)
    targets: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All names on disk that this recipe reads."""
        return [name for names in self.inputs.values() for name in names]

    def resolve(self, model: Any, source: WeightSource) -> None:
        """Fill in ``targets`` by converting tensors without values. Raises UnsupportedModel when that fails."""
        if self.converter is None:
            self.targets = {self.key: source.shape(self.names[0])}
            return
        empty = {
            pattern: [torch.empty(source.shape(name), dtype=source.dtype(name), device="meta") for name in names]
            for pattern, names in self.inputs.items()
        }
        self.targets = {name: tuple(tensor.shape) for name, tensor in self._convert(model, empty).items()}

    def stacks(self, model: Any, source: WeightSource) -> bool:
        """Whether each entry along the first axis comes from one tensor of every pattern (experts, one by one)."""
        if self.converter is None or len(self.targets) != 1:
            return False
        counts = {len(names) for names in self.inputs.values()}
        first, *rest = self.converter.operations
        if len(counts) != 1 or type(first).__name__ != "MergeModulelist" or first.dim != 0:
            return False
        for operation in rest:
            axes = [getattr(operation, axis, None) for axis in ("dim", "dim0", "dim1") if hasattr(operation, axis)]
            inner = all(isinstance(axis, int) and axis > 0 for axis in axes)
            if type(operation).__name__ not in ("Concatenate", "Transpose") or not inner:
                return False
        one = Recipe(self.key, self.converter, {pattern: names[:1] for pattern, names in self.inputs.items()})
        one.resolve(model, source)
        shape = next(iter(self.targets.values()))
        return list(one.targets.values()) == [(1, *shape[1:])] and shape[0] == counts.pop()

    def pieces(self, model: Any, source: WeightSource) -> Iterator[tuple[str, int, Tensor]]:
        """(target, first entry, values) in order of the first entry, each piece a fresh tensor on the CPU."""
        if self.converter is None:
            yield from self._copied(source)
        elif self.stacks(model, source):
            for index in range(len(next(iter(self.inputs.values())))):
                values = {pattern: [source.read(names[index])] for pattern, names in self.inputs.items()}
                for name, tensor in self._convert(model, values).items():
                    yield name, index, tensor
        else:
            values = {pattern: [source.read(name) for name in names] for pattern, names in self.inputs.items()}
            converted = self._convert(model, values)
            values.clear()
            while converted:
                name = next(iter(converted))
                yield name, 0, converted.pop(name)

    def _copied(self, source: WeightSource) -> Iterator[tuple[str, int, Tensor]]:
        name = self.names[0]
        shape = source.shape(name)
        row_bytes = max(1, torch.Size(shape[1:]).numel() * source.dtype(name).itemsize)
        step = max(1, PIECE_BYTES // row_bytes)
        if len(shape) < 2 or shape[0] <= step:
            yield self.key, 0, source.read(name)
            return
        for start in range(0, shape[0], step):
            yield self.key, start, source.read(name, slice(start, min(start + step, shape[0])))

    def _convert(self, model: Any, values: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        for pattern in list(values):
            for tensor in values[pattern]:
                converter.add_tensor(self.key, pattern, pattern, tensor)
        if isinstance(values, dict):
            values.clear()
        try:
            converted = converter.convert(self.key, model=model, config=model.config)
        except (ValueError, RuntimeError, KeyError, IndexError, AttributeError, TypeError) as error:
            reason = str(error).split("\n")[0][:120]
            raise UnsupportedModel(f"the tensors for {self.key} cannot be converted from disk: {reason}") from error
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in converted.items()}
