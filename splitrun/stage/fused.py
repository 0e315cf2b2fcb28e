"""Common decoder layers run by one kernel: put behind a layer's own forward, or behind the whole base model's.

A layer is taken when its code is known (`splitrun.stage.known`) and its weights are of the kernels' formats. Calls of
up to 16 new tokens per row then go to the kernel, longer ones to its sister for chunks where there is one, else to the
layer itself. Where every layer of a range is taken, and the model does around them what is known too, all of them run
in one call. Knows no steps and no plans.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from splitrun.kernels.cpu.block import BlockKernel, LayerChain, RowHistories
from splitrun.kernels.cpu.dense import DenseWeight
from splitrun.kernels.cpu.library import MOST_ROWS, Kernel, kernel
from splitrun.kernels.cpu.tiled import TiledWeight
from splitrun.kernels.weight import install
from splitrun.model.cut import CutModel
from splitrun.model.weights import release_free_memory
from splitrun.planner.placement import STREAM_FROM_TOKENS
from splitrun.stage.blocks import BlockStore, BlockView
from splitrun.stage.decoding import Decoding, takes_base
from splitrun.stage.known import is_known, is_known_base, is_known_norm, is_plain_head
from splitrun.stage.parts import layer_parts

if TYPE_CHECKING:
    from splitrun.stage.stream_card import StreamCard
    from splitrun.stage.streamed import StreamedLayers

log = logging.getLogger(__name__)

HALVES = (torch.bfloat16, torch.float16)
CHUNK_STEP = 16
"""Rows of activations that the kernels lay out and multiply together, there or not."""
MOST_GROUPS = 4
"""KV groups whose latest histories are kept."""


@dataclass(frozen=True)
class Fused:
    """What came of `fuse`. ``whole``: all layers run in one call, so that a token's bits are a matter of that token and
    its history, for rows of up to 16 new tokens. ``decoding``: the short way for steps that only decode."""

    whole: bool = False
    decoding: Decoding | None = None


def fuse(
    model: CutModel,
    stores: Mapping[int, BlockStore],
    card: StreamCard | None = None,
    least_tokens: int = STREAM_FROM_TOKENS,
) -> Fused:
    """Give the range's layers, and its head, the kernels where they are of that kind. ``card``: prompts of
    ``least_tokens`` and more are computed there, where its kernels take all of the layers. Modifies the model.
    """
    fast, histories = kernel(), _Histories()
    if fast is None or model.device.type != "cpu":
        return Fused()
    blocks: dict[int, BlockKernel] = {}
    for index, store in stores.items():
        layer, kept = model.skeleton.layers[index], model.structure.caches[index]
        if kept.group is None or model.structure.returns[index] or not is_known(layer, variants=True):
            continue
        _take_dense(layer, fast)
        parts = layer_parts(layer, store, kept.group.window)
        if parts is not None and parts.fault() is None:
            blocks[index] = BlockKernel(parts, fast)
            model.exchange(index, partial(_Forward, layers=_Range({index: blocks[index]}, histories)))
    own = range(model.cut.start, model.cut.stop)
    chain = [blocks[index] for index in own if index in blocks]
    joined = all(first.joins(second) for first, second in pairwise(chain))
    whole = len(chain) == len(own) and joined and is_known_base(model.skeleton.base)
    if whole and not own:
        model.shorten(_NoLayers())
    elif whole:
        model.shorten(_Range(blocks, histories, None if card is None else _streamed(chain, card, least_tokens)))
    if whole and model.cut.head:
        _take_norm(model.skeleton.base.norm, fast)
    if model.cut.head and is_plain_head(model.skeleton.model):
        outputs: Any = model.skeleton.model.get_output_embeddings()
        _take_dense(outputs, fast, model.skeleton.model.get_input_embeddings().weight)
        if isinstance(outputs.weight, TiledWeight | DenseWeight) and outputs.bias is None:
            model.chooser = outputs.weight.largest
    return Fused(whole, _decoding(model, stores, chain) if whole else None)


def _decoding(model: CutModel, stores: Mapping[int, BlockStore], chain: Sequence[BlockKernel]) -> Decoding | None:
    """The short way through the layers of a whole range."""
    if not takes_base(model.skeleton.base):
        return None
    kept = (model.structure.caches[index].group for index in range(model.cut.start, model.cut.stop))
    groups = [group for group in kept if group is not None]
    block_tokens = next((store.keys.shape[2] for store in stores.values()), 1)
    return Decoding(model, LayerChain(chain) if chain else None, groups, block_tokens)


def _streamed(chain: Sequence[BlockKernel], card: StreamCard, least_tokens: int) -> StreamedLayers | None:
    """The layers with their prompts on the card, None where it does not take them."""
    from splitrun.stage.streamed import StreamedLayers  # Triton is not everywhere

    try:
        return StreamedLayers([block.parts for block in chain], card, least_tokens)
    except ValueError as error:
        log.warning("prompts stay on the processor: %s", error)
        return None


def _take_dense(module: nn.Module, fast: Kernel, shared: Any = None) -> None:
    """Let the kernels multiply with the 16-bit matrices of linear layers. Modifies the module.

    One that is ``shared`` with an embedding stays where it is, others move to huge pages.
    """
    for linear in module.modules():
        values: Any = linear._parameters.get("weight") if isinstance(linear, nn.Linear) else None
        if values is None or not DenseWeight.takes(values):
            continue
        make = DenseWeight if values is shared else DenseWeight.on_huge_pages
        install(linear, "weight", make(values.detach(), fast))
        del values
    release_free_memory()  # before the next layer moves: two copies of a stage must not stand side by side


def _take_norm(norm: Any, fast: Kernel) -> None:
    """Let the kernels compute the norm before the head: as they do those of layers, without torch's six operators.
    Modifies the module."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in HALVES and is_known_norm(norm):
        norm.forward = _Norm(weight.detach(), float(norm.variance_epsilon), fast, norm.forward)


class _Norm:
    """A norm's forward by the kernels, for activations of its own type."""

    def __init__(self, weight: Tensor, epsilon: float, fast: Kernel, own: Callable[[Tensor], Tensor]) -> None:
        self._weight, self._epsilon, self._kernel, self._own = weight, epsilon, fast, own

    def __call__(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self._weight.dtype:
            return self._own(hidden_states)
        return self._kernel.norm(hidden_states.contiguous(), self._weight, self._epsilon)


class _NoLayers:
    """The layers of a stage that only embeds or has only the head."""

    def takes(self, rows: int, count: int) -> bool:
        """All steps."""
        return True

    def run(self, hidden: Tensor, angles: Callable[[], tuple[Tensor, Tensor]], cache: Any) -> Tensor:
        """What came in."""
        return hidden


class _Range:
    """Consecutive layers in one call of the kernel for every 16 tokens."""

    def __init__(
        self, blocks: Mapping[int, BlockKernel], histories: _Histories, streamed: StreamedLayers | None = None
    ) -> None:
        self._indices = tuple(sorted(blocks))
        self._blocks = [blocks[index] for index in self._indices]
        self._chain = LayerChain(self._blocks)
        self._histories = histories
        self._streamed = streamed

    def takes(self, rows: int, count: int) -> bool:
        """Whether rows of so many new tokens are for the kernel."""
        if self._streamed is not None and self._streamed.takes(count):
            return rows > 0
        return rows > 0 and (0 < count <= MOST_ROWS or all(block.takes_chunks() for block in self._blocks))

    def run(self, hidden: Tensor, angles: Callable[[], tuple[Tensor, Tensor]], cache: Any) -> Tensor:
        """What comes out of the last layer. Shape: (rows, count, hidden), twice (rows, count, width)."""
        rows, count, width = hidden.shape
        calls = list(zip(*(self._histories_of(cache.layers[index], count) for index in self._indices), strict=True))
        cosines, sines = (
            table.expand(rows, count, -1).to(hidden.dtype).reshape(rows * count, -1) for table in angles()
        )
        flat = hidden.reshape(rows * count, width).contiguous()
        done, parts = 0, []
        for call in calls:
            tokens = slice(done, done + call[0].tokens)
            parts.append(self._call(flat[tokens], cosines[tokens], sines[tokens], call))
            done = tokens.stop
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(rows, count, width)

    def _call(self, hidden: Tensor, cosines: Tensor, sines: Tensor, call: Sequence[RowHistories]) -> Tensor:
        if call[0].tokens <= MOST_ROWS:
            return self._chain.run(hidden, cosines, sines, call)
        if self._streamed is not None and self._streamed.takes(call[0].tokens):
            return self._streamed.run(hidden, cosines, sines, call)
        out = torch.empty_like(hidden)
        for block, histories in zip(self._blocks, call, strict=True):
            hidden = block.run_chunk(hidden, cosines, sines, histories, out)
        return hidden

    def _histories_of(self, layer: Any, count: int) -> Sequence[RowHistories]:
        return self._histories.of(layer.batch.views[layer.group], count, layer.store.keys.shape[2])


class _Forward:
    """A layer's forward: the kernel for few tokens, else the layer's own."""

    def __init__(self, own: Callable[..., Any], layers: _Range) -> None:
        self._own = own
        self._layers = layers

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, angles = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        if cache is None or angles is None or not self._layers.takes(*hidden_states.shape[:2]):
            return self._own(hidden_states, *args, **kwargs)
        return self._layers.run(hidden_states, lambda: angles, cache)


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
