"""What a model is made of, unit by unit: learned by running its skeleton once on weights of zeros.

No table of architectures: which module belongs to the embedding and which to the head follows from when it is called,
and the shapes of K, V and states are read from the cache after the run. A run of zeros costs no memory and no
multiplication, so models of any size are inspected in about a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from splitrun.errors import UnsupportedModel
from splitrun.kernels.weight import install
from splitrun.kernels.zero import ZeroWeight
from splitrun.model.rules import TensorRules
from splitrun.model.skeleton import DTYPES, Skeleton, build_skeleton, quiet_transformers
from splitrun.planner.facts import KVGroup


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter or persistent buffer of the skeleton.

    ``unit`` is 0 for the embedding, i + 1 for layer i, n + 1 for the head. ``covered``: quantized formats apply to it.
    ``tied_to`` names the parameter that it shares its tensor with.
    """

    name: str
    unit: int
    shape: tuple[int, ...]
    covered: bool
    tied_to: str | None = None


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps per token and per sequence.

    ``key`` and ``value`` are (heads, width) of what the cache receives, None for a layer without attention.
    ``states`` lists (kind, index, shape without the batch, bytes per value) of linear attention and convolutions.
    """

    group: KVGroup | None
    key: tuple[int, int] | None = None
    value: tuple[int, int] | None = None
    states: tuple[tuple[str, int, tuple[int, ...], int], ...] = ()

    @property
    def values_per_token(self) -> int:
        """Values of K and V stored per token."""
        if self.key is None or self.value is None:
            return 0
        return self.key[0] * self.key[1] + self.value[0] * self.value[1]

    @property
    def kv_heads(self) -> int:
        """Heads of K and of V together."""
        return 0 if self.key is None or self.value is None else self.key[0] + self.value[0]

    @property
    def state_bytes(self) -> int:
        """Bytes of state per sequence."""
        return sum(torch.Size(shape).numel() * width for _, _, shape, width in self.states)


@dataclass(frozen=True)
class ModelStructure:
    """Parameters by unit, caches by layer, and what a layer's forward returns (0: a tensor, k: a tuple of k)."""

    model_type: str
    layers: int
    hidden: int
    vocabulary: int
    parameters: tuple[ParameterInfo, ...]
    caches: tuple[LayerCache, ...]
    returns: tuple[int, ...]

    def names(self, units: Iterable[int]) -> list[str]:
        """Names of the parameters and persistent buffers of some units, tied ones included."""
        wanted = set(units)
        return [info.name for info in self.parameters if info.unit in wanted]

    @property
    def groups(self) -> tuple[KVGroup, ...]:
        """The distinct KV groups, "state" last, in order of first use."""
        groups = dict.fromkeys(cache.group for cache in self.caches if cache.group is not None)
        if any(cache.states for cache in self.caches):
            groups[KVGroup("state")] = None
        return tuple(groups)


def inspect(config: Any, dtype: str = "bf16") -> ModelStructure:
    """The structure of the model of ``config``. Raises UnsupportedModel with the reason when it cannot be cut."""
    return _inspected(_Question(config, str(config.to_json_string(use_diff=False)), dtype))


@dataclass(frozen=True)
class _Question:
    """Planning and loading ask about the same model."""

    config: Any = field(compare=False)
    text: str
    dtype: str


@lru_cache(maxsize=4)
def _inspected(question: _Question) -> ModelStructure:
    config, dtype = question.config, question.dtype
    skeleton = build_skeleton(config, dtype)
    rules = TensorRules(skeleton.model, DTYPES[dtype])
    ties = _ties(skeleton.model)
    fill_with_zeros(skeleton, rules.shapes)
    trace = _Trace(skeleton)
    cache, vocabulary = trace.run(config)
    count = len(skeleton.layers)
    prefix = skeleton.layers_path + "."
    parameters = []
    for name, shape in rules.shapes.items():
        if name.startswith(prefix):
            unit = int(name[len(prefix) :].split(".", 1)[0]) + 1
        else:
            unit = 0 if trace.phase.get(name.rpartition(".")[0], "head") == "embed" else count + 1
        parameters.append(ParameterInfo(name, unit, shape, rules.covers(name), ties.get(name)))
    caches = tuple(_layer_cache(layer) for layer in cache.layers[:count])
    return ModelStructure(
        model_type=config.model_type,
        layers=count,
        hidden=trace.hidden,
        vocabulary=vocabulary,
        parameters=tuple(parameters),
        caches=_chunked_as_full(config, caches),
        returns=tuple(trace.returns),
    )


def fill_with_zeros(skeleton: Skeleton, names: Iterable[str], device: str | torch.device = "cpu") -> None:
    """Install zeros that take no memory: a ZeroWeight for matrices, one zero spread out elsewhere."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = skeleton.model.get_submodule(path)
        tensor = module._parameters.get(attribute)
        if tensor is None:
            continue
        matrix = tensor.ndim >= 3 or (tensor.ndim == 2 and attribute == "weight")
        if matrix and not isinstance(module, nn.modules.conv._ConvNd):
            install(module, attribute, ZeroWeight(tensor.shape, tensor.dtype, device))
        else:
            install(module, attribute, torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape))


class _Trace:
    """Run the model once and note when each module is called, in which order the layers run, and what they return."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.phase: dict[str, str] = {}
        self.returns: list[int] = []
        self.hidden = 0
        self._order: list[int] = []

    def run(self, config: Any) -> tuple[Any, int]:
        from transformers import DynamicCache

        skeleton = self.skeleton
        count = len(skeleton.layers)
        hooks = [
            module.register_forward_pre_hook(self._note(name), with_kwargs=True)
            for name, module in skeleton.model.named_modules()
            if not name.startswith(skeleton.layers_path + ".")
        ]
        for index, layer in enumerate(skeleton.layers):
            hooks.append(layer.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._leave))
        cache = DynamicCache(config=skeleton.model.config)
        ids = torch.ones((1, 3), dtype=torch.long)
        try:
            with torch.inference_mode(), quiet_transformers():
                logits = skeleton.model(ids, use_cache=True, **{skeleton.cache_argument: cache}).logits
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
        ) as error:
            reason = str(error).split("\n")[0][:200]
            raise UnsupportedModel(f"{config.model_type} does not run under a plain cache: {reason}") from error
        finally:
            for hook in hooks:
                hook.remove()
        if self._order != list(range(count)):
            raise UnsupportedModel(f"{config.model_type} does not run its {count} layers once each in order")
        if len(cache.layers) < count:
            raise UnsupportedModel(f"{config.model_type} keeps its history outside the transformers cache")
        return cache, int(logits.shape[-1])

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered = len(self._order)
            self.phase.setdefault(name, "embed" if entered == 0 else "head")

        return hook

    def _enter(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._order.append(index)
            hidden = args[0] if args else kwargs["hidden_states"]
            self.hidden = int(hidden.shape[-1])

        return hook

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.returns.append(len(output) if isinstance(output, tuple) else 0)


def _layer_cache(layer: Any) -> LayerCache:
    keys: torch.Tensor | None = getattr(layer, "keys", None)
    values: torch.Tensor | None = getattr(layer, "values", None)
    states = []
    for kind in ("conv_states", "recurrent_states"):
        for index, tensor in (getattr(layer, kind, None) or {}).items():
            if tensor is not None:
                states.append((kind, index, tuple(tensor.shape[1:]), tensor.element_size()))
    if keys is None or values is None or keys.numel() == 0:
        return LayerCache(None, states=tuple(states))
    key, value = (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])
    if getattr(layer, "is_sliding", False):
        group = KVGroup("sliding", layer.sliding_window)
    else:
        group = KVGroup("full" if key == value else "latent")
    return LayerCache(group, key, value, tuple(states))


def _chunked_as_full(config: Any, caches: tuple[LayerCache, ...]) -> tuple[LayerCache, ...]:
    """Chunked attention forgets by chunk, not by window: its mask needs every token since the chunk's start."""
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    chunked = {index for index, kind in enumerate(types) if kind == "chunked_attention"}
    if not types and getattr(config.get_text_config(decoder=True), "attention_chunk_size", None):
        chunked = {index for index, cache in enumerate(caches) if cache.group and cache.group.kind == "sliding"}
    full = KVGroup("full")
    return tuple(
        LayerCache(full, cache.key, cache.value, cache.states) if index in chunked and cache.key else cache
        for index, cache in enumerate(caches)
    )


def _ties(model: Any) -> dict[str, str]:
    """Tied parameter -> the one it follows, as transformers ties them for this config."""
    if not model.config.get_text_config(decoder=True).tie_word_embeddings:
        return {}
    keys = model.all_tied_weights_keys
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {target: source for target, source in keys.items() if target in names and source in names}
