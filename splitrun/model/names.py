"""Which tensors on disk make up each parameter of a model: transformers' own renaming and conversion, by names alone.

No table of architectures here: the mapping is what transformers itself applies when it loads the model. Reads shapes
but no values, except to learn whether two tensors that should be tied are equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from splitrun.errors import MissingWeights
from splitrun.model.late_patterns import compiled_late
from splitrun.model.recipe import Recipe
from splitrun.model.source import WeightSource


class NameMap:
    """Module names to recipes.

    recipes     parameter or persistent buffer -> how it is made; tied names have their source's
    ties        tied name -> the name whose tensor it shares
    missing     names that nothing on disk makes, though the model needs them
    unexpected  names on disk that no parameter wants, as far as transformers does not expect that
    """

    def __init__(self, model: Any, source: WeightSource) -> None:
        """Map a skeleton's names. The skeleton must still have its parameters. Raises UnsupportedModel."""
        self._model = model
        self._source = source
        expected = model.state_dict()
        self.recipes: dict[str, Recipe] = {}
        recipes, unmatched = _collect(model, source, expected)
        for recipe in recipes:
            recipe.resolve(model, source)
            self.recipes.update(dict.fromkeys(recipe.targets, recipe))
        self._shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        unmatched.update(name for name in self.recipes if name not in expected)
        self.ties = self._resolve_ties()
        buffers = {name for name, _ in model.named_buffers()}
        absent = [name for name in expected if name not in self.recipes and name not in buffers]
        self.missing = _without(absent, model._keys_to_ignore_on_load_missing)
        patterns = {*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
        self.unexpected = _without(sorted(unmatched), patterns)

    def sources(self, name: str) -> tuple[str, ...]:
        """Names on disk that a parameter is made from; empty for a buffer that keeps its initial value."""
        recipe = self.recipes.get(name)
        return () if recipe is None else tuple(recipe.names)

    def check(self, names: Iterable[str]) -> None:
        """Raise MissingWeights when one of these parameters cannot be made, or only in another shape."""
        wanted = list(names)
        missing = [name for name in wanted if name in self.missing]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise MissingWeights(f"the checkpoint lacks {missing[0]}{more}: download the model again")
        for name in wanted:
            recipe = self.recipes.get(name)
            if recipe is None:
                continue
            found, needed = recipe.targets[self.ties.get(name, name)], self._shapes[name]
            if found != needed:
                place = self._source.place(recipe.names[0])
                raise MissingWeights(
                    f"{name} has shape {list(found)} in {place}, but config.json asks for {list(needed)}: "
                    "they do not belong together"
                )

    def _resolve_ties(self) -> dict[str, str]:
        """Tie as transformers does: to the name that is there; not at all when both are there and differ."""
        ties: dict[str, str] = {}
        declared: dict[str, str] = getattr(self._model, "all_tied_weights_keys", {})
        for target, origin in declared.items():
            if target not in self._shapes or origin not in self._shapes:
                continue
            if origin in self.recipes and target in self.recipes:
                if self._equal(self.recipes[origin], self.recipes[target]):
                    self.recipes[target] = self.recipes[origin]
                    ties[target] = origin
            elif origin in self.recipes:
                self.recipes[target] = self.recipes[origin]
                ties[target] = origin
            elif target in self.recipes:
                self.recipes[origin] = self.recipes[target]
                ties[origin] = target
        return ties

    def _equal(self, first: Recipe, second: Recipe) -> bool:
        if first is second:
            return True
        if list(first.targets.values()) != list(second.targets.values()):
            return False
        pairs = zip(first.pieces(self._model, self._source), second.pieces(self._model, self._source), strict=True)
        return all(torch.equal(one, other) for (_, _, one), (_, _, other) in pairs)


def _collect(model: Any, source: WeightSource, expected: dict[str, Any]) -> tuple[list[Recipe], set[str]]:
    """Recipes without their targets, and the renamed names on disk that match nothing."""
    from transformers import core_model_loading
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    with compiled_late(core_model_loading):
        transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    recipes: dict[str, Recipe] = {}
    unmatched: set[str] = set()
    for name in sorted(source.names(), key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if key not in expected and name in expected:
            key, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=expected)
        if key not in expected:
            unmatched.add(key)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        recipe = recipes.setdefault(key, Recipe(key, converter))
        if recipe.converter is None and recipe.inputs:
            unmatched.add(name)
            continue
        recipe.inputs.setdefault(pattern or name, []).append(name)
    return list(recipes.values()), unmatched


def _without(names: list[str], patterns: Iterable[str] | None) -> tuple[str, ...]:
    expressions = [re.compile(pattern) for pattern in patterns or ()]
    return tuple(name for name in names if not any(expression.search(name) for expression in expressions))
