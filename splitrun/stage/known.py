"""Which modules of a model compute what the kernels compute: found by their code, word for word; names play no part.

A layer is known when its forward, its attention's, MLP's and norm's, and the rotary function are those of one of the
families in REFERENCES; so is a model around its layers, and a head. Knows code, neither weights nor kernels.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from functools import cache
from typing import Any

from torch import nn

REFERENCES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
"""transformers' module -> prefix of its classes: code that all kernels are known to equal."""
VARIANTS = {"phi3": "Phi3", "granite": "Granite"}
"""The same with joined projections and partly rotated heads, or with multipliers: for kernels that take those."""
LAYER = ("DecoderLayer", "Attention", "MLP", "RMSNorm")
PROJECTIONS = {
    **{"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"},
    **{"output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
}
NORMS = {
    **{"first_norm": "input_layernorm", "second_norm": "post_attention_layernorm"},
    **{"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"},
}
OTHERS = {"self_attn", "mlp", "mlp.act_fn"}


def is_known(layer: nn.Module, variants: bool = False) -> bool:
    """Whether the layer's code is that of a reference, or of a variant, with SiLU as its activation."""
    names = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    if not all(isinstance(getattr(layer, name, None), nn.Module) for name in names):
        return False
    parts: tuple[Any, ...] = (layer, layer.self_attn, layer.mlp, layer.input_layernorm)
    norms = {type(module) for name, module in layer.named_modules() if name.endswith("norm")}
    activation = getattr(layer.mlp, "act_fn", getattr(layer.mlp, "activation_fn", None))
    if len(norms) != 1 or type(activation).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    codes = tuple(code_of(type(part).forward) for part in parts)
    rotary = _rotary(type(parts[1]))
    allowed = [reference for reference in _references() if variants or not reference.variant]
    return any(codes == reference.layer and rotary == reference.rotary for reference in allowed)


def is_known_base(base: nn.Module) -> bool:
    """Whether what a model does around its layers is: look up, maybe multiply, angles, the layers in order, a norm."""
    code = code_of(type(base).forward)
    return code is not None and any(code == reference.base for reference in _references())


def is_known_norm(norm: nn.Module) -> bool:
    """Whether a norm is the references' own: root mean square, times a vector."""
    code = code_of(type(norm).forward)
    return code is not None and any(code == reference.layer[-1] for reference in _references())


def is_plain_head(model: nn.Module) -> bool:
    """Whether logits are the output layer's product with the normed last hidden states, and nothing else."""
    code = code_of(type(model).forward)
    return code is not None and any(code == reference.head for reference in _references() if reference.plain_head)


class _Reference:
    """The code of one family."""

    def __init__(self, folder: str, prefix: str) -> None:
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        kinds = [getattr(module, prefix + name) for name in LAYER]
        self.layer = tuple(code_of(kind.forward) for kind in kinds)
        self.rotary = _rotary(kinds[1])
        self.base = code_of(getattr(module, prefix + "Model").forward)
        self.head = code_of(getattr(module, prefix + "ForCausalLM").forward)
        self.variant = folder in VARIANTS
        self.plain_head = folder == "llama"


@cache
def _references() -> tuple[_Reference, ...]:
    return tuple(_Reference(folder, prefix) for folder, prefix in (REFERENCES | VARIANTS).items())


def _rotary(kind: type) -> tuple[str | None, ...]:
    module = sys.modules[kind.__module__]
    return tuple(code_of(getattr(module, name, None)) for name in ("apply_rotary_pos_emb", "rotate_half"))


@cache
def code_of(function: Any) -> str | None:
    """What a function does, without its name, annotations, decorators and docstring; None where that cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    arguments = [argument.arg for argument in (*tree.args.args, *tree.args.kwonlyargs)]
    return f"{arguments} {[ast.dump(statement) for statement in body]}"
