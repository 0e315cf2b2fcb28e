"""Prompts of layers on the processor, computed on a card: their weights are copied there, layer by layer.

Two slabs on the card: while a layer computes with what lies in one, the next one's weights arrive in the other. The
history of the prompt's earlier chunks goes with them, and the new keys and values come back to the processor's blocks,
where decoding finds them. Knows layers and memory, no steps and no plans.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from splitrun.kernels.cpu.block import LayerParts, RowHistories
from splitrun.kernels.cpu.dense import DenseWeight
from splitrun.kernels.cpu.tiled import TiledWeight
from splitrun.kernels.gpu.layer import GpuLayer, LayerWeights, Turns
from splitrun.kernels.gpu.matrix import DENSE, TILED_INT8, TILED_NF4, GpuMatrix, Part, nf4_table
from splitrun.kernels.gpu.shapes import Heads, History
from splitrun.kernels.gpu.unpack import PromptProducts

SLABS = 2
ALIGNMENT = 256
LEAST_TOKENS = 32
"""Chunks of fewer tokens stay on the processor: copying the weights takes longer than computing with them there."""
PAGE_BYTES = 4096
SMALL_BYTES = 64 << 10
"""Smaller tensors are copied to pinned memory instead of being pinned where they lie among others."""
JOINED = (("projections", ("query", "key", "value")), ("output", ("output",)), ("gates", ("gate", "up")))
MATRICES = (*JOINED, ("down", ("down",)))
BIASES = ("query_bias", "key_bias", "value_bias")

log = logging.getLogger(__name__)


class StreamCard:
    """What the streamed layers of a process share on a card: slabs, streams, and memory for written-out values.

    Used from one thread at a time. ``slab_bytes`` is the size of both slabs together.
    """

    def __init__(self, device: torch.device, slab_bytes: int) -> None:
        self.device = device
        size = slab_bytes // SLABS // ALIGNMENT * ALIGNMENT
        self.slabs = tuple(torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLABS))
        self.table = nf4_table(device)
        self._products: dict[torch.dtype, PromptProducts] = {}
        self._pinned: list[tuple[int, int]] = []
        on_card = device.type == "cuda"
        self._computing = torch.cuda.Stream(device) if on_card else None
        self._copying = torch.cuda.Stream(device) if on_card else None
        self._arrived = [torch.cuda.Event() if on_card else None for _ in range(SLABS)]
        self._free = [torch.cuda.Event() if on_card else None for _ in range(SLABS)]

    def products(self, dtype: torch.dtype) -> PromptProducts:
        """Products of a type; all layers share their memory."""
        return self._products.setdefault(dtype, PromptProducts(dtype, self.device))

    def computing(self) -> AbstractContextManager[object]:
        """The stream that layers compute on."""
        return nullcontext() if self._computing is None else torch.cuda.stream(self._computing)

    def arrive(self, slab: int, copy: Callable[[], None]) -> None:
        """Begin to ``copy`` into a slab as soon as nobody computes with it."""
        if self._copying is None:
            copy()
            return
        free, arrived = self._free[slab], self._arrived[slab]
        assert free is not None
        assert arrived is not None
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(free)
            copy()
            arrived.record(self._copying)

    def wait(self, slab: int) -> None:
        """Let the computing stream wait for a slab's contents."""
        arrived = self._arrived[slab]
        if self._computing is not None and arrived is not None:
            self._computing.wait_event(arrived)

    def wait_here(self, slab: int) -> None:
        """Wait until a slab's contents have arrived."""
        arrived = self._arrived[slab]
        if arrived is not None:
            arrived.synchronize()

    def release(self, slab: int) -> None:
        """A slab may be written again once what was launched so far is done."""
        free = self._free[slab]
        if free is not None and self._computing is not None:
            free.record(self._computing)

    def pinned(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors where copies to the card run at full speed: small ones copied, others pinned where they lie."""
        if self.device.type != "cuda":
            return list(tensors)
        large = [tensor for tensor in tensors if tensor.nbytes >= SMALL_BYTES]
        for start, stop in _without(_pages(large), self._pinned):
            code = torch.cuda.cudart().cudaHostRegister(start, stop - start, 0)
            if int(code):
                log.warning("pinning %d bytes for the card failed (%s): prompts will take longer", stop - start, code)
                continue
            self._pinned.append((start, stop))
        return [tensor if tensor.nbytes >= SMALL_BYTES else tensor.pin_memory() for tensor in tensors]

    def close(self) -> None:
        """Unpin what was pinned, and give the memory back. May be called by every stage that used the card."""
        for start, _ in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(start)
        self._pinned.clear()
        self._products.clear()
        self.slabs = ()


def _pages(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """The pages that tensors lie on, as disjoint ranges of addresses."""
    spans = sorted(
        (
            tensor.data_ptr() // PAGE_BYTES * PAGE_BYTES,
            -(-(tensor.data_ptr() + tensor.nbytes) // PAGE_BYTES) * PAGE_BYTES,
        )
        for tensor in tensors
    )
    start = stop = 0
    for first, last in spans:
        if first > stop:
            if stop:
                yield start, stop
            start = first
        stop = max(stop, last)
    if stop:
        yield start, stop


def _without(spans: Iterable[tuple[int, int]], taken: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of the ranges is in none of those ``taken``: the ends of neighbours share pages."""
    for start, stop in spans:
        rest = start
        for first, last in sorted(taken):
            if first < stop and last > rest:
                if first > rest:
                    yield rest, first
                rest = max(rest, last)
        if rest < stop:
            yield rest, stop


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

    def __init__(self, parts: Sequence[LayerParts], card: StreamCard) -> None:
        """``parts`` have no `fault`. Raises ValueError where the card's kernels or slabs do not take them."""
        self._card = card
        self._layers = [self._layer(part) for part in parts]

    def takes(self, tokens: int) -> bool:
        """Whether a chunk of so many tokens of one prompt is for the card."""
        return tokens >= LEAST_TOKENS

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

    def _layer(self, parts: LayerParts) -> _Layer:
        first = parts.weights["query"]
        if parts.rotated != parts.keys.shape[-1] or parts.residual != 1.0 or parts.keys.dtype != first.dtype:
            raise ValueError("the card's kernels compute another kind of layer")
        tensors: list[Tensor] = []
        for _, names in MATRICES:
            for name in names:
                tensors += _bytes(parts.weights[name])
        places, end = [], 0
        for tensor in tensors:
            places.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if end > self._card.slabs[0].nbytes:
            raise ValueError(f"a layer's {end} bytes exceed a slab of {self._card.slabs[0].nbytes}")
        sources = tuple(self._card.pinned(tensors))
        vectors = {name: vector.to(self._card.device) for name, vector in parts.vectors.items()}
        weights = tuple(self._weights(parts, vectors, slab, places) for slab in self._card.slabs)
        return _Layer(sources, tuple(places), weights, vectors, parts)

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
        if len(biases) not in (0, len(BIASES)):
            raise ValueError("some projections have a bias and others none")
        return LayerWeights(
            **matrices,
            first_norm=vectors["first_norm"],
            second_norm=vectors["second_norm"],
            projection_bias=torch.cat(biases) if biases else None,
            output_bias=vectors.get("output_bias"),
            epsilon=parts.epsilon,
        )


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
    start, after = next(starts), next(starts)
    codes = slab[start : start + weight.codes.nbytes].view(rows, -1)
    scales = slab[after : after + weight.scales.nbytes].view(torch.float32)
    return Part(codes if weight.format == "nf4" else codes.view(torch.int8), scales)
