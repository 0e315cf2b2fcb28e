"""A transformers cache whose history lies in blocks and slots.

Each layer object is a subclass of the one that transformers itself would use, so masks and model code see what they
expect. Attention layers store nothing: `update` writes to the blocks of the current batch and returns the gathered
history. Layers of linear attention get their slots' states before a batch and give them back after it. Layers of other
stages only answer for lengths.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from splitrun.errors import UnsupportedModel
from splitrun.model.structure import LayerCache
from splitrun.stage.batch import Batch
from splitrun.stage.blocks import BlockStore, StateStore


class _InBlocks:
    """What the attention layers share: lengths from the batch, K and V from a store."""

    batch: Batch
    group: str = ""
    store: BlockStore | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write to the blocks, return history and new. Shape: (rows, heads, past + count, width)."""
        if self.store is None:
            raise UnsupportedModel("a layer writes K and V into another layer's cache, which splitrun cannot cut")
        return self.store.append(self.batch.views[self.group], key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens before this step, padding of shorter rows included."""
        return self.batch.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of what `update` returns."""
        view = self.batch.views.get(self.group)
        past = self.batch.past if view is None else view.past
        return past + query_length, self.batch.past - past


class _FullLayer(_InBlocks, DynamicLayer):
    pass


class _SlidingLayer(_InBlocks, DynamicSlidingWindowLayer):
    pass


class _HybridLayer(_InBlocks, LinearAttentionAndFullAttentionLayer):
    pass


class _HybridSlidingLayer(_InBlocks, LinearAttentionAndSlidingWindowAttentionLayer):
    pass


class BlockCache:
    """Makes the transformers cache of each batch for the layers of one stage.

    ``stores`` and ``states`` map the stage's own layers to their storage.
    """

    def __init__(
        self,
        config: Any,
        caches: tuple[LayerCache, ...],
        stores: Mapping[int, BlockStore],
        states: Mapping[int, StateStore],
    ) -> None:
        self._states = states
        originals = DynamicCache(config=config).layers
        if len(originals) < len(caches):
            originals = [*originals, *(DynamicLayer() for _ in range(len(caches) - len(originals)))]
        self._layers = [
            self._in_blocks(original, caches[index] if index < len(caches) else None, stores.get(index))
            for index, original in enumerate(originals)
        ]
        self._paged = [layer for layer in self._layers if isinstance(layer, _InBlocks)]
        linear = (isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self._layers)
        self._whole = None if any(linear) else Cache(layers=self._layers)

    @staticmethod
    def _in_blocks(original: Any, kept: LayerCache | None, store: BlockStore | None) -> Any:
        group = kept.group if kept is not None else None
        if not isinstance(original, CacheLayerMixin) or group is None:
            return original
        hybrid, sliding = isinstance(original, LinearAttentionCacheLayerMixin), group.kind == "sliding"
        layer: Any
        if hybrid:
            states = original.number_of_states
            layer = _HybridSlidingLayer(group.window, states) if sliding else _HybridLayer(states)
        else:
            layer = _SlidingLayer(group.window) if sliding else _FullLayer()
        layer.group, layer.store = group.name, store
        return layer

    def bind(self, batch: Batch) -> Cache:
        """The cache for one batch. It must not outlive the batch."""
        if self._whole is not None:
            for paged in self._paged:
                paged.batch = batch
            return self._whole
        layers = []
        for index, template in enumerate(self._layers):
            layer = template
            if isinstance(template, LinearAttentionCacheLayerMixin):
                layer = self._with_states(template, self._states.get(index), batch)
            if isinstance(layer, _InBlocks):
                layer.batch = batch
            layers.append(layer)
        return Cache(layers=layers)

    def save(self, cache: Cache, batch: Batch) -> None:
        """Write the states that a batch has left in its cache back to their slots. Modifies the state stores."""
        for index, store in self._states.items():
            layer = cache.layers[index]
            for name in store.shapes:
                store.write(name, batch.slots, getattr(layer, name[0])[name[1]])

    @staticmethod
    def _with_states(template: Any, store: StateStore | None, batch: Batch) -> Any:
        """A copy of the layer that holds the states of the batch's slots; empty when the rows have no history."""
        layer = copy.copy(template)
        for name, value in vars(template).items():
            if isinstance(value, dict):
                setattr(layer, name, dict(value))
        if batch.past == 0:
            return layer
        layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
        for kind, index in store.shapes if store is not None else ():
            assert store is not None
            state = store.read((kind, index), batch.slots)
            getattr(layer, kind)[index] = state
            getattr(layer, f"is_{kind}_initialized")[index] = True
            layer.device, layer.dtype = state.device, state.dtype
            if kind == "conv_states":
                layer.conv_kernel_size[index] = state.shape[-1]
        return layer
