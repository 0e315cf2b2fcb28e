"""Tiny random checkpoints of many architectures, written by transformers itself, and what the unsplit model answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from splitrun.model.skeleton import quiet_transformers
from splitrun.model.twin import twin_config

_ROPE_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_ROPE_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + index / 10 for index in range(48)],
    "long_factor": [2.0 + index / 5 for index in range(48)],
    "original_max_position_embeddings": 64,
}
_HYBRID = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": _ROPE_LLAMA3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"rope_parameters": _ROPE_YARN | {"partial_rotary_factor": 0.25}},
    "gptj": {},
    "gpt_bigcode": {},
    "opt": {"do_layer_norm_before": True},
    "bloom": {},
    "falcon": {"alibi": True, "new_decoder_architecture": False, "parallel_attn": False},
    "mpt": {},
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "deepseek_v3": {"routed_scaling_factor": 2.5, "first_k_dense_replace": 1},
    "gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 7.0},
    "gemma3_text": {},
    "phi3": {"rope_parameters": _ROPE_LONG, "original_max_position_embeddings": 64, "pad_token_id": 0},
    "gpt_oss": {"rope_parameters": _ROPE_YARN},
    "llama4_text": {},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    "granitemoe": {"embedding_multiplier": 6.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1},
    "cohere2": {"logit_scale": 0.25},
    "olmo2": {},
    "starcoder2": {"sliding_window": 8},
    "qwen3_next": {},
    "lfm2": {},
    "mamba": {},
    "jamba": _HYBRID,
}
"""Dense, mixtures, latent attention, linear attention, convolutions, learned positions, ALiBi, tied and untied heads,
windows shorter than the prompts, scaled rotary tables, multipliers off their neutral values."""

PROMPT_LENGTHS = (19, 4, 11)
NEW_TOKENS = 6


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint on disk and the unsplit model's greedy continuation of some prompts.

    ``logprobs[p][t]`` are the log-probabilities from which token t of the p-th answer was chosen. Shape: (vocabulary,)
    """

    path: Path
    layers: int
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    logprobs: tuple[torch.Tensor, ...]


def write_checkpoint(name: str, path: Path, shard: str = "50GB") -> Any:
    """Write a tiny checkpoint of an architecture in float32, no parameter at a neutral value; returns the model."""
    overrides = dict(ARCHITECTURES[name])
    config = twin_config(AutoConfig.for_model(name, **overrides))
    for token in ("bos_token_id", "eos_token_id"):
        setattr(config, token, 1)
    torch.manual_seed(len(name))
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape) * (0.8 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2)
                parameter.copy_(noise if parameter.ndim > 1 else parameter * 0.7 + noise)
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=1)
        model.save_pretrained(path, max_shard_size=shard)
    return model


def tiny_model(name: str, path: Path) -> TinyModel:
    """The checkpoint and its reference answers, from the very files that were written."""
    write_checkpoint(name, path)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(7)
    vocabulary = model.config.get_text_config().vocab_size
    prompts, answers, logprobs = [], [], []
    for length in PROMPT_LENGTHS:
        prompt = torch.randint(3, vocabulary, (1, length), generator=generator)
        with torch.inference_mode(), quiet_transformers():
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        prompts.append(tuple(prompt[0].tolist()))
        answers.append(tuple(output.sequences[0, length:].tolist()))
        logprobs.append(torch.cat(output.logits).log_softmax(-1))
    return TinyModel(path, config_layers(model.config), tuple(prompts), tuple(answers), tuple(logprobs))


def config_layers(config: Any) -> int:
    """Number of layers, whatever the config calls it."""
    return int(config.get_text_config(decoder=True).num_hidden_layers)
