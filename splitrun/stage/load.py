"""Load one stage: cut the model, read its weights, make its KV blocks.

Knows the numbers that a plan decided, not how it decided them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from splitrun.kernels.cpu.arena import fetch
from splitrun.kernels.gpu.library import usable
from splitrun.model.cut import CutModel, CutRange
from splitrun.model.skeleton import DTYPES
from splitrun.model.structure import ModelStructure
from splitrun.planner.placement import STREAM_FROM_TOKENS
from splitrun.stage.batch import FREE, BatchRules, Traits
from splitrun.stage.blocks import BlockStore, Int8BlockStore, StateStore
from splitrun.stage.cache import BlockCache
from splitrun.stage.fused import CHUNK_STEP, fuse
from splitrun.stage.generic import GenericStage, RangeStage

if TYPE_CHECKING:
    from splitrun.stage.stream_card import StreamCard

Fill = Callable[[CutModel], int]
"""Installs a cut model's own weights and returns their bytes."""


@dataclass(frozen=True)
class StageSize:
    """What a stage is given: its device and types, blocks per KV group, and slots for states."""

    device: str
    dtype: str
    kv_dtype: str
    blocks: Mapping[str, int]
    block_tokens: int
    slots: int


def load_stage(
    config: Any,
    structure: ModelStructure,
    cut: CutRange,
    size: StageSize,
    fill: Fill,
    traits: Traits = FREE,
    prompt_card: StreamCard | None = None,
    prompt_tokens: int = STREAM_FROM_TOKENS,
) -> RangeStage:
    """The stage of a range, ready to run. ``traits`` are what the proof learned about the model; ``prompt_card``
    computes prompts of layers on the processor, in chunks of ``prompt_tokens`` and more."""
    if size.dtype == "fp32" and size.device.startswith("cuda"):
        torch.backends.cudnn.allow_tf32 = False  # convolutions would otherwise round their inputs to 10 bits
    model = CutModel(config, structure, cut, size.dtype, size.device)
    weight_bytes = fill(model)
    model.finish_loading()
    stores, states = _storage(structure, cut, size)
    float32 = size.dtype == size.kv_dtype == "fp32"
    rules = BatchRules(
        groups=tuple(group for group in structure.groups if group.kind != "state"),
        block_tokens=size.block_tokens,
        has_states=any(cache.states for cache in structure.caches),
        traits=traits,
        groups_again=float32,
        prompts_alone=not float32 and size.device == "cpu",
    )
    if _has_gpu_kernels(size) and not states:
        from splitrun.stage.card import card_stage  # Triton is not everywhere

        on_card = card_stage(model, stores, rules, weight_bytes)
        if on_card is not None:
            return on_card
    fused = fuse(model, stores, prompt_card, prompt_tokens)
    if fused.whole:
        rules = replace(rules, groups_again=True)
    cache = BlockCache(model.skeleton.model.config, structure.caches, stores, states)
    stage = GenericStage(model, cache, stores, states, rules, weight_bytes, fused.decoding)
    if fused.whole:
        stage.chunk_step = CHUNK_STEP
    if prompt_card is not None:
        stage.at_close = prompt_card.close
    return stage


def _has_gpu_kernels(size: StageSize) -> bool:
    """Whether kernels of our own compute in the stage's type on its device."""
    return size.dtype != "fp32" and usable(size.device)


def _storage(
    structure: ModelStructure, cut: CutRange, size: StageSize
) -> tuple[dict[int, BlockStore], dict[int, StateStore]]:
    stores: dict[int, BlockStore] = {}
    states: dict[int, StateStore] = {}
    for index in range(cut.start, cut.stop):
        kept = structure.caches[index]
        if kept.group is not None and kept.key is not None and kept.value is not None:
            blocks = size.blocks[kept.group.name]
            sizes, device = (blocks, size.block_tokens, kept.key, kept.value), torch.device(size.device)
            if size.kv_dtype == "int8":
                stores[index] = Int8BlockStore(*sizes, device)
            else:
                stores[index] = BlockStore(*sizes, DTYPES[size.kv_dtype], device)
        if kept.states:
            states[index] = StateStore(size.slots, kept.states, DTYPES[size.dtype], torch.device(size.device))
    if size.device == "cpu":
        fetch([pool for store in stores.values() for pool in (store.keys, store.values, *(store.scales or ()))])
    return stores, states
