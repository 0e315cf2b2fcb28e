"""Fill parameters of a skeleton from a source: one at a time, in the wanted format, on the wanted device.

While loading, memory holds the results plus the pieces of one parameter: rows of a copied tensor, one expert of a
stack, or the inputs of one conversion. Knows nothing of plans; the caller says which names.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitrun.errors import CorruptWeights
from splitrun.kernels.formats import DTYPES, QUANTIZED, placed
from splitrun.kernels.weight import Weight, install
from splitrun.model.names import NameMap
from splitrun.model.recipe import Recipe
from splitrun.model.rules import TensorRules
from splitrun.model.source import WeightSource

TRIM_BYTES = 8 << 20
"""Loaded bytes after which the holes that freed pieces left are given back to the system."""


@dataclass(frozen=True)
class LoadedBytes:
    """What loading occupied: bytes on the device, shared tensors once, and names in the order they were filled."""

    nbytes: int
    names: tuple[str, ...]


class Loader:
    """Fills a skeleton's parameters and persistent buffers. Make it before anything is installed in the skeleton."""

    def __init__(self, model: Any, source: WeightSource, compute_dtype: torch.dtype) -> None:
        """Map names and rules. Raises UnsupportedModel when the tensors on disk cannot be converted."""
        self.model = model
        self.source = source
        self.map = NameMap(model, source)
        self.rules = TensorRules(model, compute_dtype)

    def load(
        self,
        names: Iterable[str],
        weight_format: str,
        device: torch.device | str,
        where: Callable[[str], str] = lambda name: "",
        keep: Callable[[str, Weight | Tensor], None] = lambda name, value: None,
    ) -> LoadedBytes:
        """Fill exactly these names. Modifies the skeleton.

        ``where`` describes a name's place in the plan for messages ("stage 1, layer 3"). ``keep`` is given each value
        under its own name, a tied one's being its source's. Tied names that are both wanted share one object. Raises
        MissingWeights for what is absent or of another shape, CorruptWeights for NaN or infinite values or broken
        files.
        """
        if weight_format not in QUANTIZED and DTYPES.get(weight_format) != self.rules.compute_dtype:
            raise ValueError(f"weights {weight_format} ask for a compute dtype of that name")
        wanted = list(dict.fromkeys(names))
        self.map.check(wanted)
        groups: dict[Recipe, list[str]] = {}
        for name in wanted:
            if name in self.map.recipes:
                groups.setdefault(self.map.recipes[name], []).append(name)
        total = untrimmed = 0
        for recipe, targets in groups.items():
            if total - untrimmed > TRIM_BYTES:
                release_free_memory()
                untrimmed = total
            try:
                for name, value in self._fill(recipe, targets, weight_format, torch.device(device)).items():
                    keep(name, value)
                    total += value.nbytes
            except CorruptWeights as error:
                place = where(targets[0])
                raise CorruptWeights(f"{error} [{place}]" if place else str(error)) from error
        release_free_memory()
        return LoadedBytes(total, tuple(wanted))

    def nbytes(self, names: Iterable[str], weight_format: str) -> int:
        """Exact bytes that `load` of these names will occupy."""
        shared = {self.map.ties.get(name, name) for name in names}
        total = 0
        for name in shared:
            recipe = self.map.recipes.get(name)
            stored = [self.source.stored_format(disk) for disk in recipe.names] if recipe else []
            if recipe is not None and recipe.converter is None and stored[0] is not None:
                total += self.source.nbytes(recipe.names[0])
            elif recipe is not None:
                total += self.rules.nbytes([name], self._format(name, stored, weight_format) or "dense")
        return total

    def _format(self, name: str, stored: list[str | None], weight_format: str) -> str | None:
        """The quantized format of a target: what it was stored in if it was, else the stage's where that applies."""
        kinds = set(stored)
        if kinds <= {None}:
            return None if self._quantized_source() else self.rules.format(name, weight_format)
        return self.rules.format(name, kinds.pop() or "dense") if len(kinds) == 1 else None

    def _quantized_source(self) -> bool:
        return getattr(self.source, "quantized", False) is True

    def _fill(
        self, recipe: Recipe, targets: list[str], weight_format: str, device: torch.device
    ) -> dict[str, Weight | Tensor]:
        """Make the targets of one recipe and install them under all their wanted names; they by their own names."""
        self._refuse_integers(recipe, targets[0])
        stored = [self.source.stored_format(name) for name in recipe.names]
        made: dict[str, Weight | Tensor] = {}
        aliases: dict[str, list[str]] = {}
        for name in targets:
            aliases.setdefault(self.map.ties.get(name, name), []).append(name)
        if recipe.converter is None and stored[0] is not None:
            weight = self.source.stored(recipe.names[0], self.rules.compute_dtype)
            if weight is not None:
                return {next(iter(aliases)): self._install(targets, placed(weight, device))}
        if self._is_read_in_place(recipe, weight_format, device):
            values = self.source.read(recipe.names[0])
            self._check(recipe, values)
            return {next(iter(aliases)): self._install(targets, values)}
        for name, start, values in recipe.pieces(self.model, self.source):
            if name not in aliases:
                continue
            if name not in made:
                made[name] = self._allocate(name, self._format(name, stored, weight_format), device)
            self._check(recipe, values)
            _store(made[name], start, values.to(device))
        return {name: self._install(aliases[name], value) for name, value in made.items()}

    def _is_read_in_place(self, recipe: Recipe, weight_format: str, device: torch.device) -> bool:
        """Whether the tensor on disk is the result: same type, not quantized, on the CPU."""
        same = recipe.converter is None and self.source.dtype(recipe.names[0]) == self.rules.dtype(recipe.key)
        return same and device.type == "cpu" and self._format(recipe.key, [None], weight_format) is None

    def _allocate(self, name: str, format: str | None, device: torch.device) -> Weight | Tensor:
        shape = self.rules.shapes[name]
        if format is not None:
            return QUANTIZED[format].empty(shape, self.rules.compute_dtype, device)
        return torch.empty(shape, dtype=self.rules.dtype(name), device=device)

    def _install(self, names: list[str], value: Weight | Tensor) -> Weight | Tensor:
        if isinstance(value, Tensor) and names[0] not in self.rules.buffers:
            value = torch.nn.Parameter(value, requires_grad=False)
        for name in names:
            install(self.model, name, value)
        return value

    def _refuse_integers(self, recipe: Recipe, target: str) -> None:
        """Raise CorruptWeights for whole numbers in a floating parameter's place: codes, whose scales nobody knows."""
        if self._quantized_source() or not self.rules.dtype(target).is_floating_point:
            return
        for name in recipe.names:
            dtype = self.source.dtype(name)
            if self.source.stored_format(name) is None and not dtype.is_floating_point:
                raise CorruptWeights(
                    f"{name} in {self.source.place(name)} is of type {str(dtype).removeprefix('torch.')}, but {target} "
                    "is a floating-point parameter and config.json has no quantization_config: take the original model"
                )

    def _check(self, recipe: Recipe, values: Tensor) -> None:
        """Raise CorruptWeights when a value is NaN or infinite, naming the tensor on disk."""
        if not values.is_floating_point() or not values.numel():
            return
        smallest, largest = torch.aminmax(values if values.dtype.itemsize > 1 else values.float())
        if torch.isfinite(smallest) and torch.isfinite(largest):
            return
        at_fault = recipe.names[0] if len(recipe.names) == 1 else f"one of {recipe.names[0]} and its like"
        place = self.source.place(recipe.names[0])
        raise CorruptWeights(f"{at_fault} in {place} holds NaN or infinite values: download the model again")


def release_free_memory() -> None:
    """Give the pages of freed pieces back to the system; glibc would keep those that lie between results."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _store(target: Weight | Tensor, start: int, values: Tensor) -> None:
    if isinstance(target, Tensor):
        if target.ndim == 0 or values.shape == target.shape:
            target.copy_(values)
        else:
            target[start : start + values.shape[0]] = values
    else:
        target.store(start, values)
