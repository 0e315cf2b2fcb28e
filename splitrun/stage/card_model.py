"""A range of a common model as the GPU kernels compute it: found by the code of the model's classes, else None.

The kernels take the place of layers, final norm and products only where transformers' own code for all of them is word
for word that of a family in `known.REFERENCES`. The model's rotary module still makes the angles. Knows no steps.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from splitrun.kernels.gpu.layer import GpuLayer, LayerWeights, Turns
from splitrun.kernels.gpu.library import widest
from splitrun.kernels.gpu.matrix import GpuMatrix, matrix_of
from splitrun.kernels.gpu.shapes import Heads
from splitrun.model.cut import CutModel
from splitrun.stage.blocks import BlockStore
from splitrun.stage.known import NORMS, OTHERS, PROJECTIONS, REFERENCES, code_of, is_known

CHANGING_ROTARY = ("dynamic", "longrope")
"""Kinds of rotary tables that depend on the longest sequence so far."""


@dataclass(frozen=True)
class CardModel:
    """The units of a range, ready for the kernels.

    layers  with the name of the KV group of each
    """

    embedding: GpuMatrix | None
    layers: tuple[tuple[GpuLayer, str], ...]
    head: Head | None
    rotary: nn.Module
    hidden: int
    vocabulary: int

    def turns(self, positions: Tensor) -> Turns:
        """The angles of the tokens' positions. Shape: (tokens,)."""
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        cosines, sines = self.rotary(like, positions.unsqueeze(0))
        return Turns(cosines[0].contiguous(), sines[0].contiguous())

    @property
    def matrices(self) -> list[tuple[GpuMatrix, bool]]:
        """Everything that is multiplied while decoding, and whether it is a gate's."""
        found: list[tuple[GpuMatrix, bool]] = [(self.head.matrix, False)] if self.head is not None else []
        for layer, _ in self.layers:
            weights = layer.weights
            found += [(weights.projections, False), (weights.output, False), (weights.gates, True)]
            found.append((weights.down, False))
        return found


@dataclass(frozen=True)
class Head:
    """The final norm and the output matrix."""

    norm: Tensor
    epsilon: float
    matrix: GpuMatrix


def card_model(model: CutModel, stores: Mapping[int, BlockStore]) -> CardModel | None:
    """The range for the kernels, None where any of it is not what they compute."""
    skeleton = model.skeleton
    base: Any = skeleton.base
    if not _is_common(skeleton.model, base) or base.rotary_emb.rope_type in CHANGING_ROTARY:
        return None
    embedding = _matrix(base.embed_tokens, ["weight"]) if model.cut.embed else None
    head = _head(model) if model.cut.head else None
    if (embedding is None and model.cut.embed) or (head is None and model.cut.head):
        return None
    layers = []
    for index, store in stores.items():
        group = model.structure.caches[index].group
        if group is None or model.structure.returns[index] or not is_known(skeleton.layers[index]):
            return None
        layer = _layer(skeleton.layers[index], store, group.window)
        if layer is None:
            return None
        layers.append((layer, group.name))
    structure = model.structure
    return CardModel(embedding, tuple(layers), head, base.rotary_emb, structure.hidden, structure.vocabulary)


def _head(model: CutModel) -> Head | None:
    base: Any = model.skeleton.base
    outputs = model.skeleton.model.lm_head
    if outputs.bias is not None:
        return None
    matrix = _matrix(outputs, ["weight"])
    return Head(base.norm.weight.detach(), float(base.norm.variance_epsilon), matrix) if matrix is not None else None


def _layer(layer: nn.Module, store: BlockStore, window: int | None) -> GpuLayer | None:
    modules: dict[str, Any] = dict(layer.named_modules())
    attention = modules["self_attn"]
    if set(modules) - {""} - OTHERS - set(PROJECTIONS.values()) - set(NORMS.values()):
        return None
    if getattr(attention, "sliding_window", window) != window or store.keys.shape != store.values.shape:
        return None
    if any(getattr(modules[PROJECTIONS[name]], "bias", None) is not None for name in ("gate", "up", "down")):
        return None
    epsilons = {modules[path].variance_epsilon for path in NORMS.values() if path in modules}
    kv_heads, width = store.keys.shape[1], store.keys.shape[3]
    if len(epsilons) != 1 or width % 2 or width > widest(store.keys.device):
        return None
    matrices = {
        "projections": _matrix(layer, [f"{PROJECTIONS[name]}.weight" for name in ("query", "key", "value")]),
        "output": _matrix(layer, [f"{PROJECTIONS['output']}.weight"]),
        "gates": _matrix(layer, [f"{PROJECTIONS[name]}.weight" for name in ("gate", "up")]),
        "down": _matrix(layer, [f"{PROJECTIONS['down']}.weight"]),
    }
    found = {name: matrix for name, matrix in matrices.items() if matrix is not None}
    if len(found) != len(matrices):
        return None
    biases = [modules[PROJECTIONS[name]].bias for name in ("query", "key", "value")]
    if len({bias is None for bias in biases}) != 1:
        return None
    norms = {name: modules[path].weight.detach() for name, path in NORMS.items() if path in modules}
    output_bias = modules[PROJECTIONS["output"]].bias
    epsilon = float(epsilons.pop())
    weights = LayerWeights(
        **found,
        first_norm=norms["first_norm"],
        second_norm=norms["second_norm"],
        projection_bias=None if biases[0] is None else torch.cat([bias.detach() for bias in biases]),
        output_bias=None if output_bias is None else output_bias.detach(),
        epsilon=epsilon,
    )
    heads = Heads(
        heads=found["output"].columns // width,
        kv_heads=kv_heads,
        width=width,
        keys=store.keys,
        values=store.values,
        query_norm=norms.get("query_norm"),
        key_norm=norms.get("key_norm"),
        epsilon=epsilon,
        scaling=float(attention.scaling),
        window=window,
    )
    return GpuLayer(weights, heads)


def _matrix(module: nn.Module, names: Sequence[str]) -> GpuMatrix | None:
    """The module's weights of those names as one matrix. None: not readable."""
    weights = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        weights.append(getattr(module.get_submodule(path) if path else module, leaf))
    return matrix_of(weights)


def _is_common(model: Any, base: Any) -> bool:
    """Whether everything around the layers is the code of the references."""
    parts = ("embed_tokens", "norm", "rotary_emb")
    if not all(isinstance(getattr(base, name, None), nn.Module) for name in parts):
        return False
    if not isinstance(getattr(model, "lm_head", None), nn.Linear):
        return False
    kinds = (type(model), type(base), type(base.norm), type(base.rotary_emb))
    plain = type(base.embed_tokens) is nn.Embedding
    return plain and tuple(code_of(kind.forward) for kind in kinds) in _common()


@cache
def _common() -> tuple[tuple[str | None, ...], ...]:
    found = []
    for folder, prefix in REFERENCES.items():
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        kinds = [getattr(module, prefix + name) for name in ("ForCausalLM", "Model", "RMSNorm", "RotaryEmbedding")]
        found.append(tuple(code_of(kind.forward) for kind in kinds))
    return tuple(found)
