"""The common decoder layer run by one kernel: found by its code and shapes, put behind the layer's own forward.

A layer is taken when its forward, its attention's, MLP's and norm's, and the rotary function are word for word those
of one of the families in REFERENCES, which is what `BlockKernel` computes; a model's name plays no part. Calls of up to
16 tokens then go to the kernel, longer ones to its sister for chunks where there is one, else to the layer itself.
Knows one layer at a time, no steps and no plans.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from splitrun.kernels.cpu.block import BlockKernel, LayerParts, RowHistories
from splitrun.kernels.cpu.library import MOST_ROWS, kernel
from splitrun.kernels.cpu.tiled import TiledWeight
from splitrun.model.cut import CutModel
from splitrun.stage.blocks import BlockStore, BlockView

REFERENCES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
"""transformers' module -> prefix of its classes: code that the kernel is known to equal."""
PROJECTIONS = {
    **{"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"},
    **{"output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
}
NORMS = {
    **{"first_norm": "input_layernorm", "second_norm": "post_attention_layernorm"},
    **{"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"},
}
OTHERS = {"self_attn", "mlp", "mlp.act_fn"}
MOST_GROUPS = 4
"""KV groups whose latest histories are kept."""


def fuse(model: CutModel, stores: Mapping[int, BlockStore]) -> int:
    """Give the range's layers the kernel where they are of that kind. Returns how many were. Modifies the model."""
    fast, histories, count = kernel(), _Histories(), 0
    if fast is None or model.device.type != "cpu":
        return 0
    for index, store in stores.items():
        layer, kept = model.skeleton.layers[index], model.structure.caches[index]
        if kept.group is None or model.structure.returns[index] or not is_known(layer):
            continue
        parts = _parts(layer, store, kept.group.window)
        if parts is not None and parts.fault() is None:
            block = BlockKernel(parts, fast)
            model.exchange(index, partial(_Forward, block=block, index=index, histories=histories))
            count += 1
    return count


class _Forward:
    """A layer's forward: the kernel for few tokens, else the layer's own."""

    def __init__(self, own: Callable[..., Any], block: BlockKernel, index: int, histories: _Histories) -> None:
        self._own = own
        self._block = block
        self._index = index
        self._histories = histories

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, positions = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        rows, count, hidden = hidden_states.shape
        if cache is None or positions is None or (count > MOST_ROWS and not self._block.takes_chunks()):
            return self._own(hidden_states, *args, **kwargs)
        layer = cache.layers[self._index]
        histories = self._histories.of(layer.batch.views[layer.group], count, layer.store.keys.shape[2])
        cosines, sines = (
            table.expand(rows, count, -1).to(hidden_states.dtype).reshape(rows * count, -1) for table in positions
        )
        flat = hidden_states.reshape(rows * count, hidden).contiguous()
        parts: list[Tensor] = []
        for call in histories:
            done = sum(part.shape[0] for part in parts)
            tokens = slice(done, done + call.tokens)
            parts.append(self._block.run(flat[tokens], cosines[tokens], sines[tokens], call))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(rows, count, hidden)


class _Histories:
    """What the layers of a group read in one batch: the latest, made once for all of them."""

    def __init__(self) -> None:
        self._latest: dict[int, tuple[BlockView, list[RowHistories]]] = {}

    def of(self, view: BlockView, count: int, block_tokens: int) -> list[RowHistories]:
        """The histories of a view, in calls of as many rows as the kernel takes."""
        found = self._latest.get(id(view))
        if found is None or found[0] is not view:
            if len(self._latest) >= MOST_GROUPS:
                self._latest.clear()
            found = self._latest[id(view)] = (view, row_histories(view, count, block_tokens))
        return found[1]


def row_histories(view: BlockView, count: int, block_tokens: int) -> list[RowHistories]:
    """A view's rows, with the blocks of their new tokens behind those of their history.

    In calls of whole rows and up to 16 tokens, a row of more alone: how a row is computed is a matter of its own new
    tokens.
    """
    written = view.blocks.tolist()
    tables = []
    for row, (table, skip, length) in enumerate(zip(view.tables, view.skips, view.lengths, strict=True)):
        blocks = table.tolist()
        for index in range(count):
            if (skip + length + index) // block_tokens >= len(blocks):
                blocks.append(written[row * count + index])
        tables.append(blocks)
    calls = []
    at_once = max(1, MOST_ROWS // count)
    for start in range(0, len(tables), at_once):
        rows = slice(start, start + at_once)
        calls.append(RowHistories(tables[rows], view.skips[rows], view.lengths[rows], count))
    return calls


def _parts(layer: nn.Module, store: BlockStore, window: int | None) -> LayerParts | None:
    modules = dict(layer.named_modules())
    if set(modules) - {""} - OTHERS - set(PROJECTIONS.values()) - set(NORMS.values()):
        return None
    attention: Any = layer.self_attn
    if getattr(attention, "sliding_window", window) != window:
        return None
    weights, vectors = {}, {}
    for name, path in PROJECTIONS.items():
        module = modules[path]
        weight, bias = module.weight, getattr(module, "bias", None)
        if not isinstance(module, nn.Linear) or not isinstance(weight, TiledWeight):
            return None
        weights[name] = weight
        if bias is not None:
            if f"{name}_bias" not in ("query_bias", "key_bias", "value_bias", "output_bias"):
                return None
            vectors[f"{name}_bias"] = bias.detach()
    epsilons = {modules[path].variance_epsilon for path in NORMS.values() if path in modules}
    if len(epsilons) != 1:
        return None
    vectors |= {name: modules[path].weight.detach() for name, path in NORMS.items() if path in modules}
    return LayerParts(weights, vectors, store.keys, store.values, window, float(epsilons.pop()), attention.scaling)


def is_known(layer: nn.Module) -> bool:
    """Whether the layer's code is that of the references."""
    names = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    if not all(isinstance(getattr(layer, name, None), nn.Module) for name in names):
        return False
    parts = (layer, layer.self_attn, layer.mlp, layer.input_layernorm)
    kinds = [type(layer), *(type(getattr(layer, name)) for name in names)]
    norms = {type(module) for name, module in layer.named_modules() if name.endswith("norm")}
    if len(norms) != 1 or type(getattr(layer.mlp, "act_fn", None)).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    codes = tuple(code_of(kind.forward) for kind in kinds[:4])
    rotary = _rotary(type(parts[1]))
    return any(codes == reference and rotary == turn for reference, turn in _references())


@cache
def _references() -> tuple[tuple[tuple[str | None, ...], tuple[str | None, ...]], ...]:
    found = []
    for folder, prefix in REFERENCES.items():
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        kinds = [getattr(module, prefix + name) for name in ("DecoderLayer", "Attention", "MLP", "RMSNorm")]
        found.append((tuple(code_of(kind.forward) for kind in kinds), _rotary(kinds[1])))
    return tuple(found)


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
