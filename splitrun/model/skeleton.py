"""Build a model's own transformers class without its weights, and find its layers.

The skeleton's parameters are on the meta device, its buffers (rotary frequencies and the like) are real. Knows nothing
of stages, files on disk or devices.
"""

from __future__ import annotations

import copy
import inspect as python_inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from splitrun.errors import UnsupportedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' advice (slow paths, missing optional kernels) off the terminal."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@dataclass(frozen=True)
class Skeleton:
    """The model object and where its parts are.

    ``cache_argument`` is the forward argument that takes the cache; ``arguments`` are all names that the base model's
    forward accepts.
    """

    model: Any
    base: nn.Module
    layers: nn.ModuleList
    layers_path: str
    cache_argument: str
    arguments: frozenset[str]
    head_arguments: frozenset[str]


def build_skeleton(config: Any, dtype: str) -> Skeleton:
    """The skeleton of the causal language model of ``config``; ``dtype`` is its compute type ("fp32", "bf16", "fp16").

    Raises UnsupportedModel when transformers has no such model or its layers are not one list.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    require_decoder(config)
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UnsupportedModel(
            f"transformers cannot build {config.model_type} as a language model: {reason}"
        ) from error
    path, layers = _layer_list(model, model.config.get_text_config(decoder=True).num_hidden_layers)
    if "." not in path:
        raise UnsupportedModel(f"{config.model_type} has no base model apart from its head, so it cannot be cut")
    base = model.get_submodule(path.split(".")[0])
    arguments = frozenset(python_inspect.signature(base.forward).parameters)
    caches = [name for name in ("past_key_values", "cache_params") if name in arguments]
    if not caches:
        raise UnsupportedModel(
            f"{config.model_type} takes no transformers cache, so its history cannot be kept in blocks"
        )
    head_arguments = frozenset(python_inspect.signature(model.forward).parameters)
    return Skeleton(model, base, layers, path, caches[0], arguments, head_arguments)


def require_decoder(config: Any) -> None:
    """Raise UnsupportedModel for a model with an encoder."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{config.model_type} has an encoder: splitrun runs decoder-only language models")


def _layer_list(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList with one entry per layer."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(name, module) for name, module in found if len(module) == count]
    if not lists:
        raise UnsupportedModel(
            f"{type(model).__name__} keeps its {count} layers in no single list, so it cannot be cut"
        )
    return min(lists, key=lambda entry: entry[0].count("."))


def exact_context(config: Any) -> int | None:
    """The longest sequence whose rotary table stays the same from its first token to its last; None: no limit.

    "dynamic" and "longrope" scalings change the table when a sequence outgrows the original length: keys that are
    cached by then would be wrong.
    """
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    tables = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    limits = [
        table.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for table in tables
        if table.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)
