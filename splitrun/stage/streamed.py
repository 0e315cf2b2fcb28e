"""Prompts of layers on the processor, computed on a card: their weights are copied there, layer by layer.

Two slabs on the card: while a layer computes with what lies in one, the next one's weights arrive in the other. The
history of the prompt's earlier chunks goes with them, and the new keys and values come back to the processor's blocks,
where decoding finds them. Knows layers and memory, no steps and no plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitrun.kernels.cpu.block import LayerParts, RowHistories
from splitrun.kernels.cpu.dense import DenseWeight
from splitrun.kernels.cpu.tiled import TiledWeight
from splitrun.kernels.gpu.layer import GpuLayer, LayerWeights, Turns
from splitrun.kernels.gpu.library import widest
from splitrun.kernels.gpu.matrix import DENSE, TILED_INT8, TILED_NF4, GpuMatrix, Part
from splitrun.kernels.gpu.shapes import Heads, History
from splitrun.stage.stream_card import ALIGNMENT, SLABS, StreamCard

JOINED = (("projections", ("query", "key", "value")), ("output", ("output",)), ("gates", ("gate", "up")))
MATRICES = (*JOINED, ("down", ("down",)))
BF16_CARDS = (8, 0)
"""The first compute capability with bf16 in its instructions."""
BIASES = ("query_bias", "key_bias", "value_bias")


@dataclass(frozen=True)
class _Layer:
    """A layer's tensors on the host and what they are in each slab; its vectors lie on the card for good."""

    sources: tuple[Tensor, ...]
    places: tuple[int, ...]
    weights: tuple[LayerWeights, ...]
    vectors: dict[str, Tensor]
    parts: LayerParts


class StreamedLayers:
    """Consecutive layers on the processor whose longer prompts are computed on a card."""

    def __init__(self, parts: Sequence[LayerParts], card: StreamCard, least_tokens: int) -> None:
        """``parts`` have no `fault`; chunks of ``least_tokens`` or more are for the card. Raises ValueError where the
        card's kernels or slabs do not take the layers."""
        self._card = card
        self._least_tokens = least_tokens
        tensors = [
            [tensor for _, names in MATRICES for name in names for tensor in _bytes(part.weights[name])]
            for part in parts
        ]
        for part, matrices in zip(parts, tensors, strict=True):
            fault = _fault(part, matrices, card)
            if fault is not None:
                raise ValueError(fault)
        pinned = iter(card.pinned([tensor for layer in tensors for tensor in layer]))
        self._layers = [
            self._layer(part, [next(pinned) for _ in layer]) for part, layer in zip(parts, tensors, strict=True)
        ]

    def takes(self, tokens: int) -> bool:
        """Whether a chunk of so many tokens of one prompt is for the card."""
        return tokens >= self._least_tokens

    def run(self, hidden: Tensor, cosines: Tensor, sines: Tensor, rows: Sequence[RowHistories]) -> Tensor:
        """What comes out of the last layer; one chunk of one prompt. Writes the new keys and values.

        ``rows`` has one entry per layer. Shape: (tokens, hidden), twice (tokens, width) -> (tokens, hidden).
        """
        card, tokens = self._card, hidden.shape[0]
        histories: dict[int, _History] = {}
        for row in rows:
            if id(row) not in histories:
                histories[id(row)] = _History(row, tokens, self._layers[0].parts.keys.shape[2], card.device)
        with card.computing():
            state = hidden.to(card.device)
            turns = Turns(*(angles.float().to(card.device).contiguous() for angles in (cosines, sines)))
            caches = self._caches([histories[id(row)] for row in rows])
            for ahead in range(min(SLABS, len(caches))):
                self._send(ahead, caches[ahead])
            for index, layer in enumerate(self._layers):
                slab = index % SLABS
                card.wait(slab)
                kernel = GpuLayer(layer.weights[slab], caches[index].heads(layer))
                state = kernel.prompt(state, card.products(state.dtype), caches[index].history.shape, turns)
                caches[index].begin_return()
                card.release(slab)
                if index + SLABS < len(caches):
                    self._send(index + SLABS, caches[index + SLABS])
            out = state.to(hidden.device)  # waits for all of it
            for cache in caches:
                cache.finish_return()
        return out

    def _caches(self, histories: Sequence[_History]) -> list[_Cache]:
        """One for each layer; every other layer has the same memory on the card."""
        device, dtype = self._card.device, self._layers[0].parts.keys.dtype
        counts = [
            2 * len(history.table) * layer.parts.keys[0].numel()
            for layer, history in zip(self._layers, histories, strict=True)
        ]
        room = [torch.empty(max(counts), dtype=dtype, device=device) for _ in range(SLABS)]
        stage = (
            [torch.empty(max(counts), dtype=dtype, pin_memory=device.type == "cuda") for _ in range(SLABS)]
            if any(history.past_blocks for history in histories)
            else room
        )
        return [
            _Cache(layer.parts, history, room[index % SLABS][:count], stage[index % SLABS][:count])
            for index, (layer, history, count) in enumerate(zip(self._layers, histories, counts, strict=True))
        ]

    def _send(self, index: int, cache: _Cache) -> None:
        """Begin to copy a layer's weights and history to the card."""
        layer, slab = self._layers[index], self._card.slabs[index % SLABS]
        if index >= SLABS and cache.history.past_blocks:
            self._card.wait_here(index % SLABS)  # the memory that the history is gathered in is still being read
        cache.gather()

        def copy() -> None:
            for source, place in zip(layer.sources, layer.places, strict=True):
                slab[place : place + source.nbytes].copy_(source, non_blocking=True)
            cache.send()

        self._card.arrive(index % SLABS, copy)

    def _layer(self, parts: LayerParts, sources: Sequence[Tensor]) -> _Layer:
        """A layer whose matrices are copied from ``sources``."""
        places, end = [], 0
        for tensor in sources:
            places.append(end)
            end += _room(tensor)
        vectors = {name: vector.to(self._card.device) for name, vector in parts.vectors.items()}
        weights = tuple(self._weights(parts, vectors, slab, places) for slab in self._card.slabs)
        return _Layer(tuple(sources), tuple(places), weights, vectors, parts)

    def _weights(
        self, parts: LayerParts, vectors: dict[str, Tensor], slab: Tensor, places: Sequence[int]
    ) -> LayerWeights:
        """The layer's weights as they will lie in a slab."""
        starts = iter(places)
        matrices = {}
        for joined, names in MATRICES:
            found = [_in_slab(parts.weights[name], slab, starts) for name in names]
            columns = parts.weights[names[0]].shape[1]
            matrices[joined] = GpuMatrix(_format(parts.weights[names[0]]), tuple(found), columns, self._card.table)
        biases = [vectors[name] for name in BIASES if name in vectors]
        return LayerWeights(
            **matrices,
            first_norm=vectors["first_norm"],
            second_norm=vectors["second_norm"],
            projection_bias=torch.cat(biases) if biases else None,
            output_bias=vectors.get("output_bias"),
            epsilon=parts.epsilon,
        )


def _room(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a slab."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _fault(parts: LayerParts, matrices: Sequence[Tensor], card: StreamCard) -> str | None:
    """Why a card cannot compute a layer's prompts, None when it can."""
    dtype = parts.weights["query"].dtype
    if parts.rotated != parts.keys.shape[-1] or parts.residual != 1.0 or parts.keys.dtype != dtype:
        return "the card's kernels compute another kind of layer"
    if sum(name in parts.vectors for name in BIASES) not in (0, len(BIASES)):
        return "some projections have a bias and others none"
    if parts.keys.shape[-1] > widest(card.device):
        return f"heads of {parts.keys.shape[-1]} values have no room on the card"
    needed = sum(map(_room, matrices))
    if needed > card.slabs[0].nbytes:
        return f"a layer's {needed} bytes exceed a slab of {card.slabs[0].nbytes}"
    on_card = card.device.type == "cuda" and torch.version.hip is None
    if dtype == torch.bfloat16 and on_card and torch.cuda.get_device_capability(card.device) < BF16_CARDS:
        return "the card does not compute in bf16, as the processor does"
    return None


class _History:
    """Where a chunk's tokens stand among the blocks that are copied to the card, numbered from 0."""

    def __init__(self, row: RowHistories, tokens: int, block_tokens: int, device: torch.device) -> None:
        (table,), (skip,), (length,) = row.tables, row.skips, row.lengths
        before = skip + length
        self.table = torch.tensor(table, dtype=torch.int64)
        self.past_blocks = -(-before // block_tokens)
        self.first_written = before // block_tokens
        numbers = [before, *range(len(table)), *range(before, before + tokens), *([0] * tokens), 0, tokens]
        sizes = [1, len(table), tokens, tokens, 2]
        lengths, blocks, positions, owners, starts = torch.tensor(numbers, dtype=torch.int32).to(device).split(sizes)
        self.shape = History(lengths, blocks.view(1, -1), positions, owners, starts, longest=tokens)


class _Cache:
    """One layer's keys and values on the card while a chunk computes there; ``staged``: pinned, for its history."""

    def __init__(self, parts: LayerParts, history: _History, room: Tensor, staged: Tensor) -> None:
        self._parts, self.history = parts, history
        shape = (2, len(history.table), *parts.keys.shape[1:])
        self._kv, self._staged = room.view(shape), staged.view(shape)

    def gather(self) -> None:
        """Put the history's blocks where they can be copied from."""
        past = self.history.past_blocks
        if past:
            for place, blocks in enumerate((self._parts.keys, self._parts.values)):
                torch.index_select(blocks, 0, self.history.table[:past], out=self._staged[place, :past])

    def send(self) -> None:
        """Copy the history's blocks to the card, on the current stream."""
        past = self.history.past_blocks
        if past:
            for place in range(2):
                self._kv[place, :past].copy_(self._staged[place, :past], non_blocking=True)

    def heads(self, layer: _Layer) -> Heads:
        """The layer's attention over the blocks on the card."""
        parts = layer.parts
        return Heads(
            heads=layer.weights[0].output.columns // parts.keys.shape[-1],
            kv_heads=parts.keys.shape[1],
            width=parts.keys.shape[-1],
            keys=self._kv[0],
            values=self._kv[1],
            query_norm=layer.vectors.get("query_norm"),
            key_norm=layer.vectors.get("key_norm"),
            epsilon=parts.epsilon,
            scaling=parts.scale,
            window=parts.window,
        )

    def begin_return(self) -> None:
        """Begin to copy the blocks with new tokens back, on the current stream."""
        new = self._kv[:, self.history.first_written :]
        self._here = torch.empty(new.shape, dtype=new.dtype, pin_memory=new.device.type == "cuda")
        for place in range(2):
            self._here[place].copy_(new[place], non_blocking=True)

    def finish_return(self) -> None:
        """Put them among the layer's blocks, when the copy is done."""
        first = self.history.first_written
        for place, blocks in enumerate((self._parts.keys, self._parts.values)):
            blocks[self.history.table[first:]] = self._here[place]


def _bytes(weight: TiledWeight | DenseWeight) -> list[Tensor]:
    """What is copied of a weight. Shape: uint8 (bytes,) each."""
    found = weight.storage if isinstance(weight, TiledWeight) else (weight.values,)
    return [tensor.reshape(-1).view(torch.uint8) for tensor in found]


def _format(weight: TiledWeight | DenseWeight) -> int:
    if isinstance(weight, DenseWeight):
        return DENSE
    return TILED_NF4 if weight.format == "nf4" else TILED_INT8


def _in_slab(weight: TiledWeight | DenseWeight, slab: Tensor, starts: Iterator[int]) -> Part:
    """A weight as it will lie in a slab, from the next of the ``starts`` on."""
    rows, columns = weight.shape
    if isinstance(weight, DenseWeight):
        start = next(starts)
        values = slab[start : start + weight.nbytes].view(weight.dtype).view(rows, columns)
        return Part(values, values)
    start = next(starts)
    codes = slab[start : start + weight.codes.nbytes].view(rows, -1)
    if weight.format == "nf4":
        return Part(codes, codes.view(torch.float32))
    after = next(starts)
    return Part(codes.view(torch.int8), slab[after : after + weight.scales.nbytes].view(torch.float32))
