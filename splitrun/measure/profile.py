"""Profile: a model's units as the planner's facts, from its structure and its files' headers; reads no weights.

Bytes come from the very code that will load the tensors, so that what a plan promises and what a stage takes agree.
Knows nothing of devices or plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from splitrun.kernels.weight import DEQUANTIZED_VALUES
from splitrun.model.files import ModelFiles
from splitrun.model.rules import expert_counts
from splitrun.model.skeleton import build_skeleton, exact_context
from splitrun.model.structure import LayerCache, ModelStructure, ParameterInfo, inspect
from splitrun.model.weights import Loader
from splitrun.planner.facts import FORMATS, ModelProfile, UnitProfile

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
ENDLESS_CONTEXT = 1 << 20
"""For models whose config names no longest sequence, such as purely recurrent ones."""
ACTIVE_EXPERT_NAMES = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
    "num_selected_experts", "experts_per_token",
)  # fmt: skip
LIVE_INTERMEDIATES = 3
"""Of a gated MLP: gate, up and their product exist at once; attention's query, key and value are smaller."""
LIVE_RECURRENT_INTERMEDIATES = 12
"""Linear attention in plain torch keeps its chunks in float32 besides."""


@dataclass(frozen=True)
class _Use:
    """How one decoded token uses a parameter: the share of its bytes read, the values multiplied.

    ``unpacked`` are the values that a quantized product turns back at a time: a linear layer goes by groups of rows.
    """

    share: float
    multiplied: float
    unpacked: int = 0


def profile(files: ModelFiles, structure: ModelStructure | None = None) -> ModelProfile:
    """The facts of every unit of a model. ``structure``: if it was inspected already.

    Raises UnsupportedModel, MissingWeights or CorruptWeights as loading it would.
    """
    structure = structure or inspect(files.config)
    skeleton = build_skeleton(files.config, "bf16")
    use = _uses(files.config, structure, skeleton.model)
    heads = _heads(skeleton.model)
    sizes = _sizes(skeleton.model, files)
    groups: list[list[ParameterInfo]] = [[] for _ in range(structure.layers + 2)]
    for info in structure.parameters:
        groups[info.unit].append(info)
    caches = [None, *structure.caches, None]
    names = ["embed", *(f"layer {index}" for index in range(structure.layers)), "head"]
    units = tuple(
        _unit(name, infos, cache, use, sizes, structure, heads)
        for name, infos, cache in zip(names, groups, caches, strict=True)
    )
    tied = {name: _tied_bytes(groups, size, files) for name, size in sizes.items()}
    return ModelProfile(
        source=files.name,
        revision=files.revision,
        fingerprint=files.fingerprint,
        model_type=structure.model_type,
        units=units,
        groups=structure.groups,
        hidden_values=structure.hidden,
        vocabulary=structure.vocabulary,
        max_context=max_context(files.config),
        stored_format=files.stored_format,
        tied_bytes=tied if any(tied.values()) else {},
    )


def _tied_bytes(groups: list[list[ParameterInfo]], size: Callable[[Iterable[str]], int], files: ModelFiles) -> int:
    """Bytes that embed and head share. What is on disk decides; dummy weights follow the config."""
    if not files.weights:
        return sum(size([info.name]) for info in (*groups[0], *groups[-1]) if info.tied_to is not None)
    embed, head = ([info.name for info in group] for group in (groups[0], groups[-1]))
    return size(embed) + size(head) - size([*embed, *head])


@dataclass(frozen=True)
class _Heads:
    """Query heads of a layer, and whether attention writes their scores out instead of working on tiles."""

    query: int
    writes_scores: bool


def _heads(model: Any) -> _Heads:
    text = model.config.get_text_config(decoder=True)
    count = getattr(text, "num_attention_heads", None)
    return _Heads(count if isinstance(count, int) else 1, model.config._attn_implementation == "eager")


def max_context(config: Any) -> int:
    """The longest sequence that a config names and that can be computed exactly."""
    text = config.get_text_config(decoder=True)
    lengths = [getattr(text, name, None) for name in CONTEXT_NAMES]
    named = next((length for length in lengths if isinstance(length, int) and length > 0), ENDLESS_CONTEXT)
    return min(named, exact_context(config) or named)


def active_experts(config: Any) -> int | None:
    """Experts that one token passes through, None where the config does not say."""
    text = config.get_text_config(decoder=True)
    for name in ACTIVE_EXPERT_NAMES:
        value = getattr(text, name, None)
        counts = [count for count in (value if isinstance(value, list | tuple) else [value]) if isinstance(count, int)]
        if counts:
            return max(counts)
    return None


def _sizes(model: Any, files: ModelFiles) -> Mapping[str, Callable[[Iterable[str]], int]]:
    """Format -> function from parameter names to the bytes they occupy when loaded in it, tied names counted once."""
    formats = FORMATS if files.stored_format not in ("int8", "nf4") else (files.stored_format,)
    half = Loader(model, files.source, torch.bfloat16)
    single = Loader(model, files.source, torch.float32) if "fp32" in formats else half

    def size_in(loader: Loader, weight_format: str) -> Callable[[Iterable[str]], int]:
        return lambda names: loader.nbytes(names, weight_format)

    return {name: size_in(single if name == "fp32" else half, name) for name in formats}


def _uses(config: Any, structure: ModelStructure, model: nn.Module) -> dict[str, _Use]:
    counts, active = expert_counts(config), active_experts(config)
    uses = {}
    for info in structure.parameters:
        module = model.get_submodule(info.name.rpartition(".")[0])
        values, rows = prod(info.shape), info.shape[0] if info.shape else 1
        if isinstance(module, nn.Embedding):
            uses[info.name] = _Use(1 / max(rows, 1), 0)
            continue
        share = 1.0
        if active is not None and len(info.shape) == 3 and rows in counts:
            share = min(1.0, active / rows)
        elif active is not None and ".experts." in info.name and counts:
            share = min(1.0, active / max(counts))
        matrix = prod(info.shape[-2:])
        unpacked = min(matrix, max(DEQUANTIZED_VALUES.values())) if isinstance(module, nn.Linear) else matrix
        uses[info.name] = _Use(share, values * share if len(info.shape) >= 2 else 0, unpacked)
    return uses


def _unit(
    name: str,
    infos: list[ParameterInfo],
    cache: LayerCache | None,
    uses: Mapping[str, _Use],
    sizes: Mapping[str, Callable[[Iterable[str]], int]],
    structure: ModelStructure,
    heads: _Heads,
) -> UnitProfile:
    matrices = [info for info in infos if len(info.shape) >= 2 and uses[info.name].multiplied]
    # The head's logits are counted apart, for the rows that are sampled only.
    logits = structure.vocabulary if name == "head" else None
    widths = [length for info in matrices for length in info.shape[-2:] if length != logits]
    live = LIVE_RECURRENT_INTERMEDIATES if cache is not None and cache.states else LIVE_INTERMEDIATES
    keeps = cache is not None and cache.group is not None and cache.values_per_token > 0
    return UnitProfile(
        name=name,
        weight_bytes={key: size([info.name for info in infos]) for key, size in sizes.items()},
        read_bytes={
            key: round(sum(size([info.name]) * uses[info.name].share for info in infos)) for key, size in sizes.items()
        },
        flops_per_token=2.0 * sum(uses[info.name].multiplied for info in infos),
        kv_values_per_token={cache.group.name: cache.values_per_token} if keeps and cache and cache.group else {},
        state_bytes=cache.state_bytes if cache is not None else 0,
        activation_values_per_token=live * max(widths, default=0),
        largest_weight_values=max((uses[info.name].unpacked for info in matrices if info.covered), default=0),
        quantized_values=sum(prod(info.shape) for info in infos if info.covered),
        heads_per_kv=max(1, heads.query // cache.key[0]) if cache is not None and cache.key is not None else 1,
        score_heads=heads.query if heads.writes_scores else 0,
        kv_heads=cache.kv_heads if keeps and cache is not None else 0,
    )
