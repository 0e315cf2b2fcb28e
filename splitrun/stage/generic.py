"""The generic stage: a range of any decoder-only model, run by the model's own code over KV in blocks.

It knows the step and the activation, nothing of requests, of other stages or of how either travels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from splitrun.errors import StageError
from splitrun.kernels.cpu.library import MOST_ROWS
from splitrun.model.cut import CutModel
from splitrun.schedule.request import TokenLogprob
from splitrun.schedule.step import IntArray, RowTokens, Step, Tokens
from splitrun.stage.batch import Batch, BatchRules, split
from splitrun.stage.blocks import BlockStore, StateStore
from splitrun.stage.cache import BlockCache
from splitrun.stage.decoding import Decoding
from splitrun.stage.sampling import is_plain, prompt_logprobs, sample

Tables = Mapping[str, IntArray | Sequence[int]]
"""Group name -> the block ids of one sequence."""


@dataclass
class Computed:
    """What one step gives before sampling.

    activation       Shape: (tokens, hidden); None when the stage has the head
    logits           row -> logits behind its last token, for the rows that want one. Shape: (vocabulary,)
    chosen           row -> its most likely token (-1 when its logits are not finite), instead of logits
    prompt_logprobs  row -> log-probabilities of the prompt tokens that follow its slice; too few when logits are not
                     finite
    """

    activation: Tensor | None = None
    logits: dict[int, Tensor] = field(default_factory=dict)
    chosen: dict[int, int] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadCounts:
    """CPU threads to compute with: a few read memory as fast as it can be read, and a prompt wants all cores."""

    decoding: int
    prompts: int

    def use(self, tokens: int) -> None:
        """Let the calling thread compute a step of that many new tokens."""
        wanted = self.decoding if tokens <= MOST_ROWS else self.prompts
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)


class RangeStage(ABC):
    """One stage, loaded and ready. ``run`` is called with steps in order, by one thread at a time."""

    reads_host = False
    """Whether activations from the processor may come in pinned memory, to be copied by the stage."""
    most_left = 0
    """How many activations of decoded rows the stage can have left in pinned memory at once; `left` says when one is
    there."""
    gives_host = False
    """Whether it is to do so: the stage behind is on the processor. Set by who puts stages in a row."""
    chunk_step = 1
    """A chunk of a prompt takes as long as one of the next multiple of so many tokens; or DOUBLING, see
    ``planner.seconds``."""
    thread_counts: ThreadCounts | None = None
    """On a processor: what was found to be fastest. None: what the calling thread has."""

    def __init__(self, model: CutModel, stores: dict[int, BlockStore], rules: BatchRules, weight_bytes: int) -> None:
        self.model = model
        self.rules = rules
        self.weight_bytes = weight_bytes
        self._stores = stores

    def left(self) -> torch.cuda.Event | None:
        """The event behind the activation that was left in pinned memory last; None: it is there already."""
        return None

    def any_thread(self, step: Step) -> bool:
        """Whether a step may run on any thread: libraries that keep memory for each thread, as cuBLAS does, have no
        part in it. So it is where there is nothing but an embedding."""
        cut = self.model.cut
        return cut.embed and cut.start == cut.stop and not cut.head

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV blocks and state slots that the stage holds."""
        return sum(store.nbytes for store in self._stores.values())

    def clear_kv(self) -> None:
        """Zeros in all KV blocks and state slots. Main memory is made when it is first written: all of it is, then."""
        for store in self._stores.values():
            store.clear()

    @property
    def kv_width(self) -> int:
        """Values of K and V of one token in all layers; 0 where nothing is stored."""
        return sum(store.width for store in self._stores.values())

    @torch.inference_mode()
    def export(self, tables: Tables, start: int, stop: int) -> Tensor:
        """The KV of one sequence's tokens ``start`` to ``stop``, on the CPU: a row per token, in it layer by layer K
        and V. ``tables``: its blocks in each group. Rows of what was dropped mean nothing.

        Shape: (tokens, kv_width).
        """
        places = self._places(tables, start, stop)
        rows: list[Tensor] = []
        for index, store in self._stores.items():
            blocks, offsets, _ = places[self._group_of(index)]
            rows += store.read(blocks, offsets)
        return torch.cat(rows, dim=1).cpu()

    @torch.inference_mode()
    def restore(self, tables: Tables, start: int, rows: Tensor) -> None:
        """Put exported KV into one sequence's blocks, from the token ``start`` on. Modifies the KV blocks.

        Raises ValueError for rows of another stage, and for tokens without blocks.
        """
        self.check_restorable(tables, start, rows)
        places = self._places(tables, start, start + rows.shape[0])
        first = 0
        for index, store in self._stores.items():
            blocks, offsets, wanted = places[self._group_of(index)]
            part = rows[wanted, first : first + store.width].to(self.model.device)
            store.write(blocks[wanted], offsets[wanted], part)
            first += store.width

    def check_restorable(self, tables: Tables, start: int, rows: Tensor) -> None:
        """Raise what ``restore`` would raise. Any thread."""
        if rows.ndim != 2 or rows.shape[1] != self.kv_width:
            raise ValueError(f"a row has {rows.shape[-1]} values, the stage keeps {self.kv_width}")
        if any((store.keys.dtype == torch.int8) != (rows.dtype == torch.int8) for store in self._stores.values()):
            raise ValueError(f"KV of {rows.dtype} is not what the stage keeps")
        for index, store in self._stores.items():
            table = tables.get(self._group_of(index), ())
            if len(table) * self.rules.block_tokens < start + rows.shape[0]:
                raise ValueError("the tokens have no blocks")
            if len(table) and int(max(table)) >= store.keys.shape[0]:
                raise ValueError("a block is not there")

    def _places(self, tables: Tables, start: int, stop: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Group -> block and offset of each token, and whether its block is there. Shape: three times (tokens,)."""
        positions = torch.arange(start, stop)
        found = {}
        for name, table in tables.items():
            blocks = torch.as_tensor(table, dtype=torch.int64)[positions // self.rules.block_tokens]
            there = (blocks >= 0).to(self.model.device)
            offsets = (positions % self.rules.block_tokens).to(self.model.device)
            found[name] = (blocks.clamp(min=0).to(self.model.device), offsets, there)
        return found

    def _group_of(self, layer: int) -> str:
        group = self.model.structure.caches[layer].group
        assert group is not None, "a layer without KV has a store"
        return group.name

    def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
        """Run the step's rows through the range.

        incoming: activation of the stage before, on this device, Shape: (tokens, hidden); None with an embedding.
        Returns the activation, same shape, or the sampled tokens when the stage has the head. Updates the KV blocks.
        """
        return self._result(step, self.compute(step, incoming))

    def _result(self, step: Step, computed: Computed) -> Tensor | Tokens:
        if not self.model.cut.head:
            assert computed.activation is not None
            return computed.activation
        empty = RowTokens()
        if not computed.logits and not computed.prompt_logprobs:
            ids = (computed.chosen.get(row, -1) for row in range(step.rows))
            return Tokens(step.index, step.epoch, tuple(RowTokens((token,)) if token >= 0 else empty for token in ids))
        chosen = {row: RowTokens((token,)) if token >= 0 else empty for row, token in computed.chosen.items()}
        chosen |= choose(step, computed.logits)
        return Tokens(
            step.index,
            step.epoch,
            tuple(
                RowTokens(
                    chosen.get(row, empty).token_ids,
                    chosen.get(row, empty).logprobs,
                    computed.prompt_logprobs.get(row, ()),
                )
                for row in range(step.rows)
            ),
        )

    @abstractmethod
    def compute(self, step: Step, incoming: Tensor | None) -> Computed:
        """As ``run``, up to the logits."""

    def close(self) -> None:
        """Give the memory back."""
        self._stores.clear()
        del self.model


class GenericStage(RangeStage):
    """A range run by the model's own code."""

    def __init__(
        self,
        model: CutModel,
        cache: BlockCache,
        stores: dict[int, BlockStore],
        states: dict[int, StateStore],
        rules: BatchRules,
        weight_bytes: int,
        decoding: Decoding | None = None,
    ) -> None:
        """``decoding``: a shorter way for the steps that it takes."""
        super().__init__(model, stores, rules, weight_bytes)
        self._cache = cache
        self._states = states
        self._decoding = decoding
        self.at_close: Callable[[], None] | None = None

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV blocks and state slots that the stage holds."""
        return super().kv_bytes + sum(store.nbytes for store in self._states.values())

    def clear_kv(self) -> None:
        """As `RangeStage.clear_kv`."""
        super().clear_kv()
        for states in self._states.values():
            states.clear()

    @torch.inference_mode()
    def prepare(self, step: Step) -> None:
        """Make ready for a step that is expected, with zeros for its tokens, while those before it run; the same object
        comes to ``run``, or another step in its place. Any thread."""
        if self._decoding is not None:
            self._decoding.prepare(step)

    def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
        """As `RangeStage.run`, without logits where nobody needs them."""
        if self.thread_counts is not None:
            self.thread_counts.use(len(step.token_ids))
        if self.model.chooser is None:
            return super().run(step, incoming)
        return self._result(step, self._compute(step, incoming, may_choose=True))

    def compute(self, step: Step, incoming: Tensor | None) -> Computed:
        """As ``run``, up to the logits."""
        return self._compute(step, incoming, may_choose=False)

    @torch.inference_mode()
    def _compute(self, step: Step, incoming: Tensor | None, may_choose: bool) -> Computed:
        computed = Computed()
        if self._decoding is not None and self._decoding.takes(step, may_choose):
            if self.model.cut.head:
                computed.chosen = dict(enumerate(self._decoding.chosen(step, incoming)))
            else:
                computed.activation = self._decoding.hidden(step, incoming)
            return computed
        for batch in split(step, self.rules, self.model.device):
            hidden = None if incoming is None else _rows_of(incoming, batch).to(self.model.dtype)
            cache = self._cache.bind(batch)
            inputs = (batch.ids, batch.positions, batch.mask, batch.past, cache, hidden)
            forward = partial(self.model.forward, *inputs)
            if may_choose and _is_greedy(step, batch):
                values, ids = self.model.choose(*inputs)
                best = torch.where(values.isfinite(), ids, -1).tolist()
                computed.chosen |= zip(batch.rows, best, strict=True)
            elif self.model.cut.head:
                _add_logits(computed, step, batch, forward)
            else:
                _add_activation(computed, step, batch, forward(None))
            self._cache.save(cache, batch)
        return computed

    def close(self) -> None:
        """Give the memory back."""
        if self.at_close is not None:
            self.at_close()
        self._states.clear()
        del self._cache, self._decoding
        super().close()


def choose(step: Step, logits: dict[int, Tensor]) -> dict[int, RowTokens]:
    """Sample the rows that want a token. A row whose logits are not finite gets none, and its neighbours theirs."""
    rows = {row: wanted for row in sorted(logits) if (wanted := step.sampling[row]) is not None}
    if not rows:
        return {}
    return dict(zip(rows, sample(torch.stack([logits[row] for row in rows]), list(rows.values())), strict=True))


def _rows_of(activation: Tensor, batch: Batch) -> Tensor:
    """The batch's part of a packed activation. Shape: (tokens, hidden) -> (rows, count, hidden)."""
    part = activation[batch.packed] if batch.packed is not None else activation[batch.tokens]
    if part.shape[0] != len(batch.rows) * batch.count:
        raise StageError(f"an activation of {activation.shape[0]} tokens does not match its step")
    return part.view(len(batch.rows), batch.count, -1)


def _add_activation(computed: Computed, step: Step, batch: Batch, hidden: Tensor) -> None:
    """Put a batch's rows where they lie in the step. Modifies ``computed``."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    total = int(step.query_starts[-1])
    if batch.packed is not None and flat.shape[0] == total:
        computed.activation = flat
        return
    if computed.activation is None:
        computed.activation = flat.new_empty((total, flat.shape[-1]))
    computed.activation[batch.tokens] = flat


def _is_greedy(step: Step, batch: Batch) -> bool:
    """Whether all that anybody wants of a batch is the most likely token of each row."""
    scored = any(step.prompt_logprobs and step.prompt_logprobs[row] is not None for row in batch.rows)
    wanted = [step.sampling[row] for row in batch.rows]
    return batch.last and not scored and all(row is not None and is_plain(row) for row in wanted)


def _add_logits(computed: Computed, step: Step, batch: Batch, forward: Callable[[int | Tensor | None], Tensor]) -> None:
    """Run the batch with only the logits that somebody wants. Modifies ``computed``."""
    scored = {row for row in batch.rows if step.prompt_logprobs and step.prompt_logprobs[row] is not None}
    wanted = {row for row in batch.rows if batch.last and step.sampling[row] is not None}
    if not scored and not wanted:
        forward(None)
        return
    logits = forward(0 if scored else 1)
    for place, row in enumerate(batch.rows):
        if row in wanted:
            computed.logits[row] = logits[place, -1]
        if row not in scored:
            continue
        targets = (step.prompt_targets or {}).get(row, ())
        offset = int(batch.positions[place, 0]) - int(step.context_lengths[row])
        targets = targets[offset : offset + batch.count]
        if targets:
            top = step.prompt_logprobs[row] or 0
            found = prompt_logprobs(logits[place, : len(targets)], targets, top)
            computed.prompt_logprobs[row] = computed.prompt_logprobs.get(row, ()) + found
