"""Shapes of real models, for benches whose weights may be random. A model is named by its directory or by its shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from splitrun.engine.loading import Load

SHAPES: dict[str, dict[str, Any]] = {
    "deepseek-1.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "hidden_size": 1536,
        "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 151936, "max_position_embeddings": 131072, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151643,
    },
    "qwen3-4b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16", "hidden_size": 2560,
        "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
    },
}  # fmt: skip
DEFAULT = "deepseek-1.5b"
"""DeepSeek-R1-Distill-Qwen-1.5B: 28 layers, hidden 1536."""
MODEL_HELP = f"a model's directory, or a shape with random weights: {', '.join(SHAPES)} (default: {DEFAULT})"


def write_shape(name: str, folder: str) -> dict[str, Any]:
    """Write the config of a shape into a folder; returns it."""
    Path(folder, "config.json").write_text(json.dumps(SHAPES[name]))
    return SHAPES[name]


def model_of(name: str, folder: str) -> tuple[str, Load]:
    """Where the model lies and how it is loaded: the config of a shape is written into ``folder``."""
    if name not in SHAPES:
        return name, "weights"
    write_shape(name, folder)
    return folder, "dummy"
