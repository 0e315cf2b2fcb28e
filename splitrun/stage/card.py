"""The stage of a common model on a GPU: decoding in captured graphs, prompts by kernels of our own.

Takes the place of the generic stage, with the same steps and results, where the range is what the kernels compute.
A decoded row takes the same way, and the same bits come out, whichever rows share its step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from splitrun.kernels.gpu.products import ROWS
from splitrun.kernels.gpu.rows import norm
from splitrun.kernels.gpu.slots import SLOTS
from splitrun.model.cut import CutModel
from splitrun.planner.seconds import DOUBLING
from splitrun.schedule.step import RowTokens, Step, Tokens
from splitrun.stage.batch import BatchRules
from splitrun.stage.blocks import BlockStore
from splitrun.stage.card_graph import Captures, DecodeGraphs, PromptGraphs
from splitrun.stage.card_model import CardModel, card_model
from splitrun.stage.generic import Computed, RangeStage, choose
from splitrun.stage.sampling import is_plain, prompt_logprobs


class CardStage(RangeStage):
    """A range of a common model on a GPU, loaded and ready."""

    reads_host = True
    most_left = SLOTS
    chunk_step = DOUBLING

    def __init__(
        self,
        model: CutModel,
        stores: dict[int, BlockStore],
        rules: BatchRules,
        weight_bytes: int,
        card: CardModel,
    ) -> None:
        super().__init__(model, stores, rules, weight_bytes)
        self._card = card
        self._groups = tuple(group.name for group in rules.groups)
        self._latest: tuple[Step, bool] | None = None
        captures = self._captures = Captures(model.device)
        self._graphs = DecodeGraphs(card, self._groups, model.dtype, model.device, captures)
        self._prompts = PromptGraphs(card, self._groups, model.dtype, model.device, captures)

    def any_thread(self, step: Step) -> bool:
        """As `RangeStage.any_thread`; decoding takes kernels of our own."""
        latest = self._latest
        if latest is None or latest[0] is not step:  # it is asked several times, by more than one thread
            decodes = step.rows <= ROWS and int(step.query_starts[-1]) == step.rows and not _scored(step)
            latest = self._latest = (step, decodes)
        return latest[1]

    def prepare(self, step: Step) -> None:
        """Make ready for a step that is expected, with zeros for its tokens, while those before it run; the same object
        comes to ``run``, or another step in its place. Any thread."""
        if self.any_thread(step):
            self._graphs.prepare(step)

    def left(self) -> torch.cuda.Event | None:
        """As `RangeStage.left`."""
        return self._graphs.done

    @torch.inference_mode()
    def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
        """As `RangeStage.run`. Greedy rows that only decode bring back their ids and nothing else."""
        if not self.any_thread(step):
            return super().run(step, incoming)
        rows = range(step.rows)
        if not self.model.cut.head:
            self._graphs.run(step, rows, incoming, leaves=self.gives_host)
            return self._graphs.left(step.rows) if self.gives_host else self._graphs.hidden(step.rows).clone()
        wanted = [sampling for sampling in step.sampling if sampling is not None]
        plain = len(wanted) == step.rows and all(map(is_plain, wanted))
        self._graphs.run(step, rows, incoming, leaves=plain)
        if plain:
            ids = self._graphs.chosen(step.rows)
            if min(ids) >= 0:
                return Tokens(step.index, step.epoch, tuple(RowTokens((token,)) for token in ids))
        logits = self._graphs.logits(step.rows)
        picked = choose(step, {row: logits[row] for row in rows if step.sampling[row] is not None})
        return Tokens(step.index, step.epoch, tuple(picked.get(row, RowTokens()) for row in rows))

    @torch.inference_mode()
    def compute(self, step: Step, incoming: Tensor | None) -> Computed:
        """As `RangeStage.compute`."""
        computed = Computed()
        if incoming is not None:
            incoming = incoming.to(self.model.device, non_blocking=True)
        total = int(step.query_starts[-1])
        if not self.model.cut.head:
            shape = (total, self._card.hidden)
            computed.activation = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        counts = step.counts.tolist()
        replays = [row for row, count in enumerate(counts) if count > 1 and step.replay and step.replay[row]]
        prompts = [
            row for row, count in enumerate(counts) if (count > 1 and row not in replays) or _is_scored(step, row)
        ]
        decodes = [row for row in range(step.rows) if row not in replays and row not in prompts]
        for start in range(0, len(decodes), ROWS):
            self._decode(computed, step, decodes[start : start + ROWS], incoming, 0)
        for row in replays:
            for offset in range(counts[row]):
                self._decode(computed, step, [row], incoming, offset)
        for start in range(0, len(prompts), ROWS):
            self._prompt(computed, step, prompts[start : start + ROWS], incoming)
        return computed

    def _decode(self, computed: Computed, step: Step, rows: list[int], incoming: Tensor | None, offset: int) -> None:
        """One new token of each of up to 16 rows. Modifies ``computed``."""
        places = step.query_starts[rows] + offset
        packed = len(rows) == step.rows == int(step.query_starts[-1])
        index = None if packed else torch.from_numpy(places.astype(numpy.int64)).to(self.model.device)
        arriving = incoming if incoming is None or index is None else incoming[index]
        self._graphs.run(step, rows, arriving, offset)
        if computed.activation is not None:
            target = computed.activation
            hidden = self._graphs.hidden(len(rows))
            target.copy_(hidden) if index is None else target.index_copy_(0, index, hidden)
            return
        logits = self._graphs.logits(len(rows))
        for place, row in enumerate(rows):
            if offset == int(step.counts[row]) - 1 and step.sampling[row] is not None:
                computed.logits[row] = logits[place].clone()

    def _prompt(self, computed: Computed, step: Step, rows: list[int], incoming: Tensor | None) -> None:
        """All new tokens of some rows. Modifies ``computed``."""
        tokens = numpy.concatenate(
            [numpy.arange(step.query_starts[row], step.query_starts[row + 1], dtype=numpy.int64) for row in rows]
        )
        whole = len(tokens) == int(step.query_starts[-1])
        index = None if whole else torch.from_numpy(tokens).to(self.model.device)
        arriving = incoming if incoming is None or index is None else incoming[index]
        hidden = self._prompts.run(step, rows, arriving)
        if computed.activation is None:
            self._add_logits(computed, step, rows, hidden)
        elif index is None:
            computed.activation.copy_(hidden)
        else:
            computed.activation.index_copy_(0, index, hidden)

    def _add_logits(self, computed: Computed, step: Step, rows: Sequence[int], hidden: Tensor) -> None:
        """Logits of the tokens that somebody wants. Modifies ``computed``."""
        start = 0
        last: dict[int, int] = {}
        for row in rows:
            stop = start + int(step.counts[row])
            if step.sampling[row] is not None:
                last[row] = stop - 1
            targets = (step.prompt_targets or {}).get(row, ())
            if _is_scored(step, row) and targets:
                logits = self._logits(hidden[start : start + len(targets)])
                top = step.prompt_logprobs[row] or 0
                computed.prompt_logprobs[row] = prompt_logprobs(logits, targets, top)
            start = stop
        if last:
            index = torch.tensor(list(last.values()), device=hidden.device)
            computed.logits |= zip(last, self._logits(hidden[index]), strict=True)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Shape: (tokens, hidden) -> (tokens, vocabulary)."""
        head = self._card.head
        assert head is not None
        normed = norm(hidden.contiguous(), head.norm, head.epsilon, torch.empty_like(hidden))
        logits = hidden.new_empty((hidden.shape[0], head.matrix.rows))
        for start in range(0, hidden.shape[0], ROWS):
            self._graphs.products(normed[start : start + ROWS], head.matrix, logits[start : start + ROWS])
        return logits

    def close(self) -> None:
        """Give the memory back."""
        self._captures.forget()
        del self._graphs, self._prompts, self._card
        super().close()


def _scored(step: Step) -> bool:
    return any(wanted is not None for wanted in step.prompt_logprobs)


def _is_scored(step: Step, row: int) -> bool:
    return bool(step.prompt_logprobs) and step.prompt_logprobs[row] is not None


def card_stage(
    model: CutModel, stores: dict[int, BlockStore], rules: BatchRules, weight_bytes: int
) -> CardStage | None:
    """The stage of a loaded range; None where the kernels do not compute what its model does."""
    card = card_model(model, stores)
    return CardStage(model, stores, rules, weight_bytes, card) if card is not None else None
