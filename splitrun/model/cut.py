"""A contiguous range of a model's units, run by the model's own forward.

The skeleton of the whole model is kept; what is foreign to the range costs nothing. A foreign embedding gives zeros
from weights that take no memory. Foreign layers before the range hand on the activation that came from the stage
before; foreign layers behind it pass through. So everything a model does around its layers (multipliers, positions,
masks, rotary tables) happens once and in its own code, and no architecture needs code here.

Knows nothing of stages, blocks or requests: the caller passes ids, positions, a mask and a transformers cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from splitrun.errors import UnsupportedModel
from splitrun.kernels.weight import Weight
from splitrun.model.skeleton import DTYPES, Skeleton, build_skeleton
from splitrun.model.structure import ModelStructure, fill_with_zeros

Chooser = Callable[[Tensor], tuple[Tensor, Tensor] | None]
"""Per row of the normed hidden states the largest logit and its lowest id; None: not for these rows."""


class Layers(Protocol):
    """All layers of a range at once, for the steps that they can do."""

    def takes(self, rows: int, count: int) -> bool:
        """Whether they run for so many rows of so many new tokens."""

    def run(self, hidden: Tensor, angles: Callable[[], tuple[Tensor, Tensor]], cache: Any) -> Tensor:
        """What comes out of the last layer; ``angles`` makes cosines and sines. Updates the cache.

        Shape: (rows, count, hidden), twice (rows, count, width) -> (rows, count, hidden).
        """


@dataclass(frozen=True)
class CutRange:
    """Which units: the embedding or not, layers start to stop (half-open), the head or not."""

    embed: bool
    start: int
    stop: int
    head: bool

    def units(self, layers: int) -> list[int]:
        """Unit numbers: 0 for the embedding, i + 1 for layer i, layers + 1 for the head."""
        inner = list(range(self.start + 1, self.stop + 1))
        return ([0] if self.embed else []) + inner + ([layers + 1] if self.head else [])


class CutModel:
    """The forward of a range. Its own parameters are on the meta device until a loader installs them."""

    def __init__(self, config: Any, structure: ModelStructure, cut: CutRange, dtype: str, device: str) -> None:
        self.structure = structure
        self.cut = cut
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device)
        self.skeleton: Skeleton = build_skeleton(config, dtype)
        self.own_names = tuple(structure.names(cut.units(structure.layers)))
        self._incoming: Tensor | None = None
        self._captured: Tensor | None = None
        self._inner: dict[int, _Inner] = {}
        self.chooser: Chooser | None = None
        self._wire_layers()
        outputs = self.skeleton.model.get_output_embeddings() if cut.head else None
        if outputs is not None:
            outputs.register_forward_pre_hook(_with_plain_strides)

    def finish_loading(self) -> None:
        """After the loader has installed the range's own parameters: free the others, move buffers to the device.

        Foreign layers never run, so their buffers (masks of old models can be large) are dropped.
        """
        self._make_foreign_units_free()
        for index, layer in enumerate(self.skeleton.layers):
            if not self.cut.start <= index < self.cut.stop:
                for module in layer.modules():
                    module._buffers.update(dict.fromkeys(module._buffers))
        for module in self.skeleton.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        past: int,
        cache: Any,
        incoming: Tensor | None,
        logits_to_keep: int | Tensor | None,
    ) -> Tensor:
        """Run the range.

        ids, positions  Shape: (rows, count)
        mask            Shape: (rows, past + count), 1 where there is a token; None when all are
        incoming        the activation from the stage before, Shape: (rows, count, hidden); None with an embedding
        logits_to_keep  with a head: how many last positions, or which, get logits; None for no logits at all

        Returns the activation behind the last layer, Shape: (rows, count, hidden), or the logits, Shape: (rows,
        kept, vocabulary). Updates the cache.
        """
        arguments = self._arguments(ids, positions, mask, past, cache)
        self._incoming = incoming
        try:
            if self.cut.head and logits_to_keep is not None:
                if "logits_to_keep" in self.skeleton.head_arguments:
                    return self._logits(arguments | {"logits_to_keep": logits_to_keep})
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                return self._logits(arguments)[:, kept]
            self.skeleton.base(**arguments)
            assert self._captured is not None
            return self._captured
        finally:
            self._incoming = self._captured = None

    def choose(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, past: int, cache: Any, incoming: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `forward` with a head that has a `chooser`: per row the largest logit behind its last token and its lowest
        id, without logits where the chooser can. Shape: (rows,), int64 (rows,). Updates the cache."""
        self._incoming = incoming
        try:
            hidden = self.skeleton.base(**self._arguments(ids, positions, mask, past, cache)).last_hidden_state[:, -1]
            return self.largest(hidden)
        finally:
            self._incoming = self._captured = None

    def largest(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The end of `choose`: from the normed activations of rows' last tokens. Shape: (rows, hidden) -> (rows,),
        int64 (rows,)."""
        assert self.chooser is not None
        found = self.chooser(normed)
        if found is not None:
            return found
        values, ids = self.skeleton.model.get_output_embeddings()(normed).max(dim=-1)
        return values, ids

    def _arguments(self, ids: Tensor, positions: Tensor, mask: Tensor | None, past: int, cache: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": True, self.skeleton.cache_argument: cache}
        accepted = self.skeleton.arguments
        if mask is not None:
            arguments["attention_mask"] = mask
        if "position_ids" in accepted:
            arguments["position_ids"] = positions
        if "cache_position" in accepted:
            arguments["cache_position"] = torch.arange(past, past + ids.shape[1], device=ids.device)
        return arguments

    def shorten(self, layers: Layers) -> None:
        """Let the base model run ``layers`` in place of its own loop over them, for the steps that they take.

        Only for a base that embeds, maybe multiplies, makes angles, runs its layers and norms. Modifies the model.
        """
        base: Any = self.skeleton.base
        own = base.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            ids, cache, positions = (kwargs.get(name) for name in ("input_ids", "past_key_values", "position_ids"))
            if args or ids is None or cache is None or positions is None or not layers.takes(*ids.shape):
                return own(*args, **kwargs)
            hidden = self.embed(ids) if self.cut.embed else self._received()
            hidden = self._captured = layers.run(hidden, partial(base.rotary_emb, hidden, positions), cache)
            return _BaseOutput(base.norm(hidden) if self.cut.head else hidden, cache)

        base.forward = forward

    def embed(self, ids: Tensor) -> Tensor:
        """What goes into the first layer, for a base that `shorten` takes. Shape: any -> (*any, hidden)."""
        base: Any = self.skeleton.base
        table = base.get_input_embeddings()
        plain = type(table) is torch.nn.Embedding and isinstance(table.weight, Weight)
        hidden: Tensor = table.weight.rows(ids) if plain else table(ids)
        multiplier = getattr(base, "embedding_multiplier", None)
        return hidden if multiplier is None else hidden * multiplier

    def exchange(self, index: int, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Let layer ``index`` run ``make(its own forward)``; the cut around it stays. Modifies the model."""
        self._inner[index].forward = make(self._inner[index].forward)

    def _logits(self, arguments: dict[str, Any]) -> Tensor:
        logits: Tensor = self.skeleton.model(**arguments).logits
        return logits

    def _make_foreign_units_free(self) -> None:
        own = set(self.own_names)
        inner = self.skeleton.layers_path + "."
        foreign = [
            info.name for info in self.structure.parameters if info.name not in own and not info.name.startswith(inner)
        ]
        fill_with_zeros(self.skeleton, foreign, self.device)

    def _wire_layers(self) -> None:
        start, stop, count = self.cut.start, self.cut.stop, self.structure.layers
        for index, layer in enumerate(self.skeleton.layers):
            if start <= index < stop:
                layer.forward = self._inner[index] = _Inner(layer.forward)
            else:
                layer.forward = self._pass_on(index)
        if not self.cut.embed:
            first = self.skeleton.layers[0]
            first.forward = self._receive(first.forward) if start == 0 and stop > 0 else self._hand_on()
        if stop < count:
            layer = self.skeleton.layers[stop]
            layer.forward = self._capture_input(layer.forward)
        else:
            last = self.skeleton.layers[count - 1]
            last.forward = self._capture_output(last.forward)

    def _returned(self, index: int, hidden: Tensor) -> Any:
        """What layer ``index`` would return around ``hidden``: the tensor itself or a tuple that begins with it."""
        length = self.structure.returns[index]
        return (hidden,) + (None,) * (length - 1) if length else hidden

    def _pass_on(self, index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._returned(index, _hidden(args, kwargs))

    def _hand_on(self) -> Callable[..., Any]:
        """Layer 0 as the source of the activation that came from the stage before."""
        return lambda *args, **kwargs: self._returned(0, self._received())

    def _receive(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Layer 0 of the range itself, on the activation instead of the zeros of the foreign embedding."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                return inner(self._received(), *args[1:], **kwargs)
            return inner(**{**kwargs, "hidden_states": self._received()})

        return forward

    def _capture_input(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._captured = _hidden(args, kwargs)
            return inner(*args, **kwargs)

        return forward

    def _capture_output(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            self._captured = output[0] if isinstance(output, tuple) else output
            return output

        return forward

    def _received(self) -> Tensor:
        if self._incoming is None:
            raise UnsupportedModel("a stage without embedding was run without an activation")
        return self._incoming


class _Inner:
    """A layer's own forward, which may be exchanged behind what the cut wraps around it."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


@dataclass
class _BaseOutput:
    """What a base model gives back, as heads read it: transformers' own class takes longer to make than some stages."""

    last_hidden_state: Tensor
    past_key_values: Any
    hidden_states: None = None
    attentions: None = None

    def __getitem__(self, place: int) -> Any:
        return (self.last_hidden_state, self.past_key_values)[place]


def _with_plain_strides(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A prompt's last row as a tensor of its own: a slice's strides make torch's CPU product thirty times as slow."""
    hidden, *others = args
    return (hidden.clone(memory_format=torch.contiguous_format), *others)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden
