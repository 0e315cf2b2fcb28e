"""Work on a GPU as captured graphs: inputs copied in, one launch, results read where they lie.

A graph holds the launches for one number of rows (decoding) or of tokens (prompts), is captured when that number first
comes, and shares its memory with the others. Knows a range of units and steps; nothing of sampling.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from splitrun.errors import StageError
from splitrun.kernels.gpu.layer import DecodeMemory
from splitrun.kernels.gpu.products import ROWS, Products
from splitrun.kernels.gpu.rows import norm
from splitrun.kernels.gpu.unpack import PromptProducts, gather
from splitrun.planner.seconds import doubled
from splitrun.schedule.step import Step
from splitrun.stage.card_inputs import DecodeSlots, PromptInputs
from splitrun.stage.card_model import CardModel
from splitrun.stage.recording import recording

SIZES = (1, 2, 4, 8, 16)
"""Numbers of decoding rows that graphs are captured for; a step takes the next larger one."""


class Captures:
    """Graphs by key. Without a GPU the launches are simply made.

    ``stream`` is the one that they were captured on last, and are replayed on: the stage's worker has no other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.stream: torch.cuda.Stream | None = None

    def has(self, key: Hashable) -> bool:
        """Whether ``run`` would replay."""
        return self._pool is None or key in self._graphs

    def capture(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Record what ``launch`` does; a first, real run compiles and loads the kernels."""
        launch()
        current = torch.cuda.current_stream(self._device)
        assert self.stream in (None, current), "a stage's graphs are captured on one stream"
        self.stream = current
        current.synchronize()
        torch.cuda.empty_cache()  # graphs have memory of their own; the first run's must not stand beside it
        graph = torch.cuda.CUDAGraph()
        own = None if current == torch.cuda.default_stream(self._device) else current
        try:
            with recording(), torch.cuda.graph(graph, self._pool, own, capture_error_mode="thread_local"):
                launch()
            self._graphs[key] = graph
        finally:
            if key not in self._graphs:  # torch takes the pool for one that is still recorded to
                self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Do what was recorded."""
        if self._pool is None:
            launch()
        else:
            self._graphs[key].replay()

    def forget(self) -> None:
        """Drop all graphs: memory that they read has moved."""
        self._graphs.clear()


class DecodeGraphs:
    """Runs rows of one new token each, up to 16, through a range of units."""

    def __init__(
        self, card: CardModel, groups: Sequence[str], dtype: torch.dtype, device: torch.device, captures: Captures
    ) -> None:
        self._card, self._device, self._groups, self._captures = card, device, tuple(groups), captures
        self.products = Products(device)
        self.products.reserve(card.matrices, dtype)
        self._hidden = torch.zeros((ROWS, card.hidden), dtype=dtype, device=device)
        layers = [layer for layer, _ in card.layers]
        self._memory = DecodeMemory(layers[0].weights, layers[0].heads, self.products, dtype) if layers else None
        self._normed = torch.zeros_like(self._hidden)
        outputs = card.head.matrix.rows if card.head is not None else 0
        self._logits = torch.zeros((ROWS, outputs), dtype=dtype, device=device)
        self._chosen = torch.zeros(ROWS, dtype=torch.int64, device=device)
        leaving = self._hidden if card.head is None else self._chosen
        self._slots = DecodeSlots(groups, self._hidden, card.embedding is None, leaving)
        self._filling = threading.Lock()

    def run(
        self, step: Step, rows: Sequence[int], incoming: Tensor | None, offset: int = 0, *, leaves: bool = False
    ) -> None:
        """Compute rows of a step, each with its new token at ``offset``; what comes out stays here.

        incoming: the rows' activation from the stage before, Shape: (rows, hidden); None with an embedding. ``leaves``:
        the activation, or with a head the chosen tokens, goes to pinned memory too.
        """
        count = len(rows)
        if incoming is not None and incoming.shape[0] != count:
            raise StageError(f"an activation of {incoming.shape[0]} tokens does not match its step")
        self._make_room(step)
        size = 1 if count == 1 else next(size for size in SIZES if size >= count)
        if not self._captures.has(("decode", size)):
            self._capture(size)
        with self._filling:
            self._slots.write(step, rows, incoming, offset, leaves=leaves)
            self._captures.run(("decode", size), lambda: self._launch(size))
            self._slots.launched(self._captures.stream)

    def prepare(self, step: Step) -> None:
        """Make ready for a step of one new token a row that is expected, on any thread; never waits."""
        if not self._filling.acquire(blocking=False):
            return
        try:
            if _widest(step) <= self._slots.blocks:
                self._slots.prepare(step)
        finally:
            self._filling.release()

    def _capture(self, size: int) -> None:
        with self._filling:
            self._slots.write_absent()
            try:
                self._captures.capture(("decode", size), lambda: self._launch(size))
            finally:
                self._slots.recount()

    def hidden(self, rows: int) -> Tensor:
        """The activation behind the last layer. Shape: (rows, hidden); changes with the next run."""
        return self._hidden[:rows]

    def logits(self, rows: int) -> Tensor:
        """Shape: (rows, vocabulary); changes with the next run."""
        return self._logits[:rows]

    def left(self, rows: int) -> Tensor:
        """What the latest run has left in pinned memory, once it is done; written anew after SLOTS runs that do."""
        return self._slots.left(rows)

    @property
    def done(self) -> torch.cuda.Event | None:
        """Behind the latest run; None where work is done when it is launched."""
        return self._slots.done

    def chosen(self, rows: int) -> list[int]:
        """The most likely token of each row of a run that leaves, -1 where its logits are not finite. Waits for it."""
        self._slots.wait()
        return [int(token) for token in self._slots.left(rows).tolist()]

    def _make_room(self, step: Step) -> None:
        """Wider tables for longer histories; graphs read them in place and are captured anew."""
        widest = _widest(step)
        if widest > self._slots.blocks:
            with self._filling:
                self._captures.forget()
                self._slots.wait()
                self._slots.set_blocks(1 << (widest - 1).bit_length())

    def _launch(self, rows: int) -> None:
        """The launches of one step; nothing is allocated that must outlive it."""
        card, slots, hidden = self._card, self._slots, self._hidden[:rows]
        slots.take(rows)
        if card.embedding is not None:
            gather(card.embedding, slots.ids[:rows], hidden)
        if card.layers:
            assert self._memory is not None
            turns = card.turns(slots.lengths[:rows].clamp(min=0))
            for layer, group in card.layers:
                layer.decode(hidden, self._memory, slots.history(group, rows), turns)
        if card.head is not None:
            normed, logits = self._normed[:rows], self._logits[:rows]
            norm(hidden, card.head.norm, card.head.epsilon, normed)
            self.products(normed, card.head.matrix, logits)
            best = logits.max(dim=-1)
            self._chosen[:rows] = torch.where(best.values.isfinite(), best.indices, -1)
        slots.deliver(rows)


def _widest(step: Step) -> int:
    return max((table.shape[1] for table in step.block_tables.values()), default=0)


class PromptGraphs:
    """Runs the new tokens of up to 16 rows, side by side and padded to a round number, through a range's layers."""

    def __init__(
        self, card: CardModel, groups: Sequence[str], dtype: torch.dtype, device: torch.device, captures: Captures
    ) -> None:
        self._card, self._dtype, self._device, self._captures = card, dtype, device, captures
        self._products = PromptProducts(dtype, device)
        self._inputs = PromptInputs(groups, device)
        self._hidden = torch.empty((0, card.hidden), dtype=dtype, device=device)

    def run(self, step: Step, rows: Sequence[int], incoming: Tensor | None) -> Tensor:
        """The activation behind the last layer. Shape: (tokens, hidden); changes with the next run.

        incoming: the rows' activation from the stage before, same shape; None with an embedding.
        """
        tokens = int(step.counts[rows].sum())
        if incoming is not None and incoming.shape[0] != tokens:
            raise StageError(f"an activation of {incoming.shape[0]} tokens does not match its step")
        if incoming is not None and not self._card.layers:
            return incoming.to(self._dtype)
        size, places = doubled(tokens), 1 if len(rows) == 1 else ROWS
        if self._inputs.make_room(step, size) or self._hidden.shape[0] < size:
            self._captures.forget()
            room = max(size, self._hidden.shape[0])
            self._hidden = torch.zeros((room, self._card.hidden), dtype=self._dtype, device=self._device)
        key = ("prompt", size, places)
        if not self._captures.has(key):
            self._inputs.clear()
            self._captures.capture(key, lambda: self._launch(size, places))
        self._inputs.write(step, rows)
        if incoming is not None:
            self._hidden[:tokens].copy_(incoming, non_blocking=True)
        self._captures.run(key, lambda: self._launch(size, places))
        return self._hidden[:tokens]

    def _launch(self, tokens: int, rows: int) -> None:
        card, inputs = self._card, self._inputs
        hidden = self._hidden[:tokens]
        if card.embedding is not None:
            gather(card.embedding, inputs.ids[:tokens], hidden)
        if not card.layers:
            return
        turns, after = card.turns(inputs.positions[:tokens].clamp(min=0)), hidden
        for layer, group in card.layers:
            after = layer.prompt(after, self._products, inputs.history(group, tokens, rows), turns)
        hidden.copy_(after)
