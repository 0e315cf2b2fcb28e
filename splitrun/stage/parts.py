"""What a known layer consists of, as the kernel for whole layers wants it. Knows one layer at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from splitrun.kernels.cpu.block import LayerParts
from splitrun.kernels.cpu.dense import DenseWeight
from splitrun.kernels.cpu.tiled import TiledWeight
from splitrun.stage.blocks import BlockStore
from splitrun.stage.known import NORMS, OTHERS, PROJECTIONS

JOINED = {"self_attn.qkv_proj": ("query", "key", "value"), "mlp.gate_up_proj": ("gate", "up")}
"""Projections that some families keep in one matrix, one below the other."""
IDLE = {"resid_attn_dropout", "resid_mlp_dropout", "mlp.activation_fn"}
BIASES = ("query_bias", "key_bias", "value_bias", "output_bias")


def layer_parts(layer: nn.Module, store: BlockStore, window: int | None) -> LayerParts | None:
    """The parts of a layer of known code; None where a part is of another kind than the kernel takes."""
    modules: dict[str, Any] = dict(layer.named_modules())
    known = OTHERS | IDLE | set(PROJECTIONS.values()) | set(NORMS.values()) | set(JOINED)
    attention: Any = layer.self_attn
    if set(modules) - {""} - known or getattr(attention, "sliding_window", window) != window:
        return None
    found = _projections(modules, store)
    epsilons = {modules[path].variance_epsilon for path in NORMS.values() if path in modules}
    if found is None or len(epsilons) != 1:
        return None
    weights, vectors = found
    vectors |= {name: modules[path].weight.detach() for name, path in NORMS.items() if path in modules}
    return LayerParts(
        weights,
        vectors,
        store.keys,
        store.values,
        window,
        float(epsilons.pop()),
        attention.scaling,
        rotary=_rotary_width(attention, store.keys.shape[-1]),
        kv_scales=store.scales,
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
    )


def _projections(
    modules: dict[str, Any], store: BlockStore
) -> tuple[dict[str, TiledWeight | DenseWeight], dict[str, Tensor]] | None:
    weights: dict[str, TiledWeight | DenseWeight] = {}
    biases: dict[str, Tensor] = {}
    for path, names in [(path, (name,)) for name, path in PROJECTIONS.items()] + list(JOINED.items()):
        module = modules.get(path)
        if module is None:
            continue
        weight, bias = module.weight, getattr(module, "bias", None)
        if not isinstance(module, nn.Linear) or not isinstance(weight, TiledWeight | DenseWeight):
            return None
        start = 0
        for name, rows in zip(names, _heights(names, weight.shape[0], store), strict=True):
            part = weight if len(names) == 1 else weight.part(start, start + rows)
            if not isinstance(part, TiledWeight | DenseWeight):
                return None  # a tile would be cut
            weights[name] = part
            if bias is not None:
                if f"{name}_bias" not in BIASES:
                    return None
                biases[f"{name}_bias"] = bias.detach()[start : start + rows]
            start += rows
    return (weights, biases) if set(weights) == set(PROJECTIONS) else None


def _heights(names: tuple[str, ...], rows: int, store: BlockStore) -> tuple[int, ...]:
    """Rows of each of the projections in one matrix."""
    if len(names) == 1:
        return (rows,)
    if names == JOINED["mlp.gate_up_proj"]:
        return (rows // 2, rows // 2)
    kept = store.keys.shape[1] * store.keys.shape[3]
    return (rows - 2 * kept, kept, kept)


def _rotary_width(attention: Any, width: int) -> int:
    """How many of a head's values are rotated."""
    parameters = getattr(attention.config, "rope_parameters", None) or {}
    return int(width * parameters.get("partial_rotary_factor", 1.0))
