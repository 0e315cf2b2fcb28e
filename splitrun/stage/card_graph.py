"""Decoding on a GPU as one captured graph per number of rows: inputs copied in, one launch, results copied out.

Graphs are captured when a number of rows first comes, in memory that they share. Knows a range of units and steps;
nothing of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from splitrun.errors import StageError
from splitrun.kernels.gpu.layer import DecodeMemory
from splitrun.kernels.gpu.products import ROWS, Products
from splitrun.kernels.gpu.rows import norm
from splitrun.kernels.gpu.unpack import gather
from splitrun.schedule.step import Step
from splitrun.stage.card_inputs import DecodeInputs
from splitrun.stage.card_model import CardModel

SIZES = (1, 2, 4, 8, 16)
"""Numbers of rows that graphs are captured for; a step takes the next larger one."""

FIRST_BLOCKS = 64
"""Blocks of a row that there is room for at first."""


class DecodeGraphs:
    """Runs rows of one new token each, up to 16, through a range of units."""

    def __init__(
        self, card: CardModel, groups: Sequence[str], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._card, self._device, self._groups = card, device, tuple(groups)
        self.products = Products(device)
        self.products.reserve(card.matrices)
        self._inputs = DecodeInputs(self._groups, FIRST_BLOCKS, device)
        self._hidden = torch.zeros((ROWS, card.hidden), dtype=dtype, device=device)
        layers = [layer for layer, _ in card.layers]
        self._memory = DecodeMemory(layers[0].weights, layers[0].heads, self.products, dtype) if layers else None
        self._normed = torch.zeros_like(self._hidden)
        outputs = card.head.matrix.rows if card.head is not None else 0
        self._logits = torch.zeros((ROWS, outputs), dtype=dtype, device=device)
        self._chosen = torch.zeros(ROWS, dtype=torch.int64, device=device)
        self._chosen_here = torch.zeros(ROWS, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    def run(self, step: Step, rows: Sequence[int], incoming: Tensor | None, offset: int = 0) -> None:
        """Compute rows of a step, each with its new token at ``offset``; what comes out stays here.

        incoming: the rows' activation from the stage before, Shape: (rows, hidden); None with an embedding.
        """
        count = len(rows)
        self._make_room(step)
        self._inputs.write(step, rows, offset)
        if incoming is not None:
            if incoming.shape[0] != count:
                raise StageError(f"an activation of {incoming.shape[0]} tokens does not match its step")
            self._hidden[:count].copy_(incoming, non_blocking=True)
        size = next(size for size in SIZES if size >= count)
        if self._pool is None:
            self._compute(size)
            return
        if size not in self._graphs:
            self._capture(size, step, rows, incoming, offset)
        self._graphs[size].replay()

    def hidden(self, rows: int) -> Tensor:
        """The activation behind the last layer. Shape: (rows, hidden); changes with the next run."""
        return self._hidden[:rows]

    def logits(self, rows: int) -> Tensor:
        """Shape: (rows, vocabulary); changes with the next run."""
        return self._logits[:rows]

    def chosen(self, rows: int) -> list[int]:
        """The most likely token of each row, -1 where its logits are not finite. Waits for the GPU."""
        self._chosen_here[:rows].copy_(self._chosen[:rows], non_blocking=True)
        if self._done is not None:
            self._done.record()
            self._done.synchronize()
        return [int(token) for token in self._chosen_here[:rows].tolist()]

    def _make_room(self, step: Step) -> None:
        """Wider tables for longer histories; graphs read them in place and are captured anew."""
        widest = max((table.shape[1] for table in step.block_tables.values()), default=0)
        if widest > self._inputs.blocks:
            self._graphs.clear()
            self._inputs = DecodeInputs(self._groups, 1 << (widest - 1).bit_length(), self._device)

    def _compute(self, rows: int) -> None:
        """The launches of one step; nothing is allocated that must outlive it."""
        card, hidden = self._card, self._hidden[:rows]
        if card.embedding is not None:
            gather(card.embedding, self._inputs.ids[:rows], hidden)
        if card.layers:
            assert self._memory is not None
            turns = card.turns(self._inputs.lengths[:rows].clamp(min=0))
            for layer, group in card.layers:
                layer.decode(hidden, self._memory, self._inputs.history(group, rows), turns)
        if card.head is not None:
            normed, logits = self._normed[:rows], self._logits[:rows]
            norm(hidden, card.head.norm, card.head.epsilon, normed)
            self.products(normed, card.head.matrix, logits)
            best = logits.max(dim=-1)
            self._chosen[:rows] = torch.where(best.values.isfinite(), best.indices, -1)

    def _capture(self, size: int, step: Step, rows: Sequence[int], incoming: Tensor | None, offset: int) -> None:
        """Record the launches for a number of rows; a first run without any row compiles and loads the kernels."""
        self._inputs.lengths.fill_(-1)
        self._compute(size)
        torch.cuda.current_stream(self._device).synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._compute(size)
        self._graphs[size] = graph
        self._inputs.write(step, rows, offset)
        if incoming is not None:
            self._hidden[: len(rows)].copy_(incoming, non_blocking=True)
