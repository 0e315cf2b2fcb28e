"""Steps that only decode, through a range that the kernels take as a whole: from a step's arrays straight to them.

What comes out has the bits that the model's own code gives around the same kernels; that code alone takes longer than
a small layer. Knows steps and kernels; what a model is made of, its caller has found out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from splitrun.errors import StageError
from splitrun.kernels.cpu.block import LayerChain, RowHistories
from splitrun.kernels.cpu.library import MOST_ROWS
from splitrun.model.cut import CutModel
from splitrun.planner.facts import KVGroup
from splitrun.schedule.step import IntArray, Step
from splitrun.stage.sampling import is_plain

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles depend on the position alone, and not on how long a sequence has become."""
KEPT_POSITIONS = 8192
"""Positions whose angles are kept; those behind are computed at each step."""
FIRST_POSITIONS = 256


@dataclass(frozen=True)
class _Inputs:
    """What the layers need beside the activation: angles of the new tokens, and what each layer reads."""

    cosines: Tensor
    sines: Tensor
    histories: Sequence[RowHistories]


class Decoding:
    """``groups``: the KV group of each layer of the range. ``chain``: the layers, None where there are none."""

    def __init__(self, model: CutModel, chain: LayerChain | None, groups: Sequence[KVGroup], block_tokens: int) -> None:
        self._model = model
        self._chain = chain
        self._groups = {group.name: group for group in groups}
        self._names = tuple(group.name for group in groups)
        self._block_tokens = block_tokens
        self._base: Any = model.skeleton.base
        self._angles: tuple[Tensor, Tensor] | None = None
        self._ready: deque[tuple[Step, _Inputs]] = deque(maxlen=2)  # one may be on its way while the next is expected

    def takes(self, step: Step, may_choose: bool) -> bool:
        """Whether the step is one: a token a row, no row scored, and with a head nothing wanted but the most likely
        tokens. A mere embedding takes every step."""
        if self._chain is None and not self._model.cut.head:
            return True
        rows = step.rows
        if (
            len(step.token_ids) != rows
            or rows > MOST_ROWS
            or any(wanted is not None for wanted in step.prompt_logprobs)
        ):
            return False
        if not self._model.cut.head:
            return True
        wanted = step.sampling
        return (
            may_choose and self._model.chooser is not None and all(one is not None and is_plain(one) for one in wanted)
        )

    def prepare(self, step: Step) -> None:
        """Make ready for a step that is expected, if it will be taken: it comes to ``hidden`` next or behind the one
        before it, or another one in its place. Any thread."""
        angles = self._angles
        known = angles is not None and step.rows > 0 and step.context_lengths.max() < len(angles[0])
        if self._chain is not None and known and self.takes(step, may_choose=True):
            self._ready.append((step, self._inputs(step)))

    def hidden(self, step: Step, incoming: Tensor | None) -> Tensor:
        """The activation behind the last layer. Shape: (tokens, hidden), as ``incoming``, None with an embedding.
        Updates the KV blocks."""
        if incoming is None:
            hidden = self._model.embed(torch.from_numpy(step.token_ids).long())
        else:
            hidden = incoming.to(self._model.dtype)
            if hidden.shape[0] != len(step.token_ids):
                raise StageError(f"an activation of {hidden.shape[0]} tokens does not match its step")
        if self._chain is None:
            return hidden
        ready = next((inputs for expected, inputs in tuple(self._ready) if expected is step), None)
        inputs = ready or self._inputs(step)
        return self._chain.run(hidden.contiguous(), inputs.cosines, inputs.sines, inputs.histories)

    def chosen(self, step: Step, incoming: Tensor | None) -> list[int]:
        """With a head: the most likely token of each row, -1 where its logits are not finite."""
        normed = self._base.norm(self.hidden(step, incoming))
        values, ids = (found.tolist() for found in self._model.largest(normed))
        return [token if isfinite(value) else -1 for value, token in zip(values, ids, strict=True)]

    def _inputs(self, step: Step) -> _Inputs:
        histories = {
            name: self._histories(step.block_tables[name], step, group) for name, group in self._groups.items()
        }
        return _Inputs(*self._rotation(step), [histories[name] for name in self._names])

    def _histories(self, table: IntArray, step: Step, group: KVGroup) -> RowHistories:
        tables, skips, lengths = [], [], []
        room = self._block_tokens
        for row, history in enumerate(step.context_lengths.tolist()):
            length = history if group.window is None else min(history, group.window - 1)
            first = history - length
            tables.append(table[row, first // room : history // room + 1].tolist())
            skips.append(first % room)
            lengths.append(length)
            assert min(tables[-1]) >= 0, "a needed block was dropped"
        return RowHistories(tables, skips, lengths, 1)

    def _rotation(self, step: Step) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the new tokens. Shape: (rows, rotated width)."""
        longest = max(step.context_lengths.tolist())
        if longest >= KEPT_POSITIONS:
            return self._computed(torch.from_numpy(step.context_lengths).long())
        if self._angles is None or longest >= len(self._angles[0]):
            count = max(FIRST_POSITIONS, 1 << longest.bit_length())
            self._angles = self._computed(torch.arange(count))
        cosines, sines = self._angles
        if step.rows == 1:
            return cosines[longest : longest + 1], sines[longest : longest + 1]
        positions = torch.from_numpy(step.context_lengths).long()
        return cosines[positions], sines[positions]

    def _computed(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        typed = torch.empty(0, dtype=self._model.dtype)  # all that the model's code asks of an activation
        cosines, sines = self._base.rotary_emb(typed, positions.unsqueeze(0))
        return cosines[0].to(typed.dtype), sines[0].to(typed.dtype)


def takes_base(base: Any) -> bool:
    """Whether a known base's angles are those of positions alone."""
    return getattr(base.rotary_emb, "rope_type", None) in STATIC_ROPE
