"""Tiny random models of many architectures, for tests of loading."""

from __future__ import annotations

from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": False}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 128}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 32}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
            **{"moe_intermediate_size": 64, "first_k_dense_replace": 1, "num_key_value_heads": 4},
            **{"q_lora_rank": 32, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
        },
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 8}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}),
    "llama4_text": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "head_dim": 16},
    ),
    "granite": ("GraniteConfig", {"embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mamba": ("MambaConfig", {"state_size": 8, "expand": 2, "conv_kernel": 4}),
    "jamba": (
        "JambaConfig",
        {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
}


def make_config(name: str) -> Any:
    """The tiny config of an architecture."""
    import transformers

    class_name, changes = ARCHITECTURES[name]
    config = getattr(transformers, class_name)(**{**COMMON, **changes})
    config._experts_implementation = "eager"
    return config


def make_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny random model of that architecture, every value off its neutral one."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name), dtype=dtype).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(buffer for key, buffer in model.named_buffers() if "bias" in key)]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.05)
    return model


def make_skeleton(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The same class without weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def logits(model: Any) -> torch.Tensor:
    """Of a fixed prompt of two rows."""
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        result: torch.Tensor = model(ids).logits
    return result
