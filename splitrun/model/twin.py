"""A tiny twin of a model's configuration: the same structure and multipliers, dimensions that run in milliseconds.

Knows configurations only. What is proved with the twin is the business of `splitrun.stage.proof`.
"""

from __future__ import annotations

import copy
from typing import Any

WINDOW = 8
"""Sliding windows and attention chunks of a twin: shorter than the prompts it is tried on."""

ROTARY = 16
"""Width of a twin's heads, all of it rotated unless a partial factor says less."""

GROWING_ROTARY = ("dynamic", "longrope", None)
"""Rotary scalings whose table changes with the length; their contexts are limited instead (`exact_context`)."""

_SMALL = {
    "vocab_size": 128, "hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64, "embedding_size": 64,
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "ffn_hidden_size": 96, "dim_feedforward": 96,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "head_dim": 16, "rotary_dim": 8,
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256, "n_ctx": 256,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "intermediate_size_mlp": 96, "moe_shared_expert_intermediate_size": 32,
    "n_group": 2, "topk_group": 1, "n_groups": 2, "mamba_n_groups": 2,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "qk_head_dim": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "sliding_window": WINDOW, "attention_chunk_size": WINDOW, "attention_window_size": WINDOW, "window_size": WINDOW,
    "sliding_window_size": WINDOW, "keep_window_size": WINDOW, "floor_scale": WINDOW, "log_scaling_n_floor": WINDOW,
    "chunk_size": WINDOW, "mamba_chunk_size": WINDOW, "block_size": WINDOW, "index_topk": WINDOW, "rel_extent": WINDOW,
    "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_expand": 2,
    "mamba_dt_rank": 4, "time_step_rank": 4, "lru_width": 64, "block_ff_dim": 96, "conv_dim": 64,
}  # fmt: skip
_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "unk_token_id")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PER_LAYER = ("layer_types", "attention_layers", "mlp_layer_types", "layers_block_type", "no_rope_layers")


def twin_config(config: Any) -> Any:
    """A small copy of ``config``; the original is not modified.

    Every dimension that is present is shrunk, every multiplier, scaling and switch is kept, and enough layers remain
    that each kind of layer occurs. Raises whatever the configuration class raises when the small values contradict
    something it demands.
    """
    fields = copy.deepcopy(config.to_dict())
    layers = _layer_count(config, fields)
    _shrink(fields, layers)
    if {"expand", "num_heads", "head_dim"} <= fields.keys():
        fields["head_dim"] = int(fields["expand"] * fields["hidden_size"]) // fields["num_heads"]
    if {"mamba_d_ssm", "mamba_n_heads", "mamba_d_head"} <= fields.keys():
        fields["mamba_d_head"] = fields["mamba_d_ssm"] // fields["mamba_n_heads"]
    fields.pop("transformers_version", None)
    fields.pop("dtype", None)
    fields.pop("quantization_config", None)
    return type(config).from_dict(fields)


def _shrink(fields: dict[str, Any], layers: int) -> None:
    heads = next((fields[name] for name in ("num_attention_heads", "n_head", "num_heads") if fields.get(name)), 4)
    for name, value in list(fields.items()):
        if isinstance(value, dict) and name.endswith(("config", "rope_parameters", "rope_scaling")):
            _shrink(value, layers)
        elif name in _SMALL and isinstance(value, int) and not isinstance(value, bool) and value > _SMALL[name]:
            fields[name] = _SMALL[name]
        elif name in _HEADS and isinstance(value, int):
            fields[name] = 4 if value >= heads else 1 if value == 1 else 2
        elif name in _TOKENS and value is not None:
            fields[name] = _token(value)
        elif name in _COUNTS:
            fields[name] = layers
        elif name in _PER_LAYER and isinstance(value, list):
            fields[name] = value[:layers]
        elif name == "original_max_position_embeddings" and fields.get("rope_type") not in GROWING_ROTARY:
            fields[name] = WINDOW
        elif name == "moe_layers" and isinstance(value, list):
            fields[name] = [layer for layer in value if layer < layers]
        elif name in ("short_factor", "long_factor") and isinstance(value, list):
            fields[name] = value[: ROTARY // 2]
        elif name == "mrope_section" and isinstance(value, list):
            fields[name] = [4, 2, 2]


def _token(value: Any) -> Any:
    """Special ids keep their order of magnitude below the twin's vocabulary."""
    return [_token(item) for item in value] if isinstance(value, list) else min(int(value), 127)


def _layer_count(config: Any, fields: dict[str, Any]) -> int:
    """Layers of the twin: at least three, at most twelve, with every kind that the configuration lists."""
    text = config.get_text_config(decoder=True)
    total = int(text.num_hidden_layers)
    kinds = [tuple(value) for name in _PER_LAYER if isinstance(value := getattr(text, name, None), list) and value]
    need = 3
    for listed in kinds:
        need = max(need, 1 + max(listed.index(kind) for kind in set(listed)))
    first_dense = fields.get("first_k_dense_replace") or 0
    need = max(need, min(first_dense, 6) + 2)
    return min(total, need, 12)
