"""Turn a step into batches that a transformers model can run: rows of equal new length, histories right-aligned.

Index arithmetic only; the results are tensors on the stage's device. Knows block tables, nothing of who owns them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from splitrun.planner.facts import KVGroup
from splitrun.schedule.blocks import REPLAY_TOKENS
from splitrun.schedule.step import Step
from splitrun.stage.blocks import BlockView


@dataclass(frozen=True)
class Batch:
    """Some rows of a step, with the same number of new tokens.

    rows       row numbers in the step
    tokens     where the batch's tokens lie in the step's packed tensors. Shape: (rows * count,)
    packed     the slice of the step's tokens when they lie side by side, else None
    count      new tokens per row
    past       longest history in the batch; shorter ones are padded on the left
    ids, positions  Shape: (rows, count)
    mask       1 where there is a token, None when nothing is padded. Shape: (rows, past + count)
    slots      state slot per row. Shape: (rows,)
    views      KV group name -> where to read and write
    last       whether these are the last tokens of their slices
    """

    rows: tuple[int, ...]
    tokens: Tensor
    packed: slice | None
    count: int
    past: int
    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    slots: Tensor
    views: Mapping[str, BlockView]
    last: bool


@dataclass(frozen=True)
class Traits:
    """How a model's rows may be run together, as the proof found out (`splitrun.stage.proof`).

    one_by_one       tokens behind a history are fed singly: its states cannot be continued by chunk
    equal_histories  rows of a batch have histories of one length: it reads positions off the padded cache
    """

    one_by_one: bool = False
    equal_histories: bool = False


FREE = Traits()
"""Any rows together, any chunks: almost every model."""


@dataclass(frozen=True)
class BatchRules:
    """What model and kernels ask of a batch.

    has_states  rows with and without history do not mix
    groups_again  tokens computed again may go up to 16 together, as they lie in the step: what they give is a matter of
                each token alone. Otherwise they are fed singly, as they were the first time
    prompts_alone  a row of more than 16 tokens is alone in its batch: products of so many round by how many there are
    """

    groups: tuple[KVGroup, ...]
    block_tokens: int
    has_states: bool = False
    traits: Traits = FREE
    groups_again: bool = False
    prompts_alone: bool = False


def split(step: Step, rules: BatchRules, device: torch.device) -> Iterator[Batch]:
    """The step as batches, in an order that respects histories. A row whose prompt is scored is alone in its batch:
    every token of a batch with such a row gets logits."""
    members: dict[tuple[int, int, int, bool], list[int]] = {}
    for row, count in enumerate(step.counts.tolist()):
        history = int(step.context_lengths[row])
        kind = history if rules.traits.equal_histories else int(history > 0) if rules.has_states else 0
        scored = bool(step.prompt_logprobs) and step.prompt_logprobs[row] is not None
        alone = row if scored or (rules.prompts_alone and count > REPLAY_TOKENS) else -1
        again = _is_replay(step, row) and not rules.groups_again
        singly = count > 1 and (again or (rules.traits.one_by_one and history > 0))
        members.setdefault((count, kind, alone, singly), []).append(row)
    for (count, _, _, singly), rows in members.items():
        if singly:
            for offset in range(count):
                yield _batch(step, rules, device, rows, offset, 1, offset == count - 1)
        else:
            yield _batch(step, rules, device, rows, 0, count, True)


def _is_replay(step: Step, row: int) -> bool:
    """Whether the row holds generated tokens that are computed again."""
    return bool(step.replay) and step.replay[row]


def _batch(
    step: Step, rules: BatchRules, device: torch.device, rows: list[int], offset: int, count: int, last: bool
) -> Batch:
    starts = step.query_starts[rows].astype(numpy.int64) + offset
    histories = step.context_lengths[rows].astype(numpy.int64) + offset
    steps = numpy.arange(count, dtype=numpy.int64)
    tokens = (starts[:, None] + steps).reshape(-1)
    positions = histories[:, None] + steps
    past = int(histories.max())
    mask = None
    if rules.groups and int(histories.min()) != past:  # layers of states alone never look at the history
        padded = numpy.arange(past + count) >= (past - histories)[:, None]
        mask = torch.from_numpy(padded.astype(numpy.int64)).to(device)
    contiguous = len(tokens) == 1 or bool((numpy.diff(tokens) == 1).all())
    return Batch(
        rows=tuple(rows),
        tokens=torch.from_numpy(tokens).to(device),
        packed=slice(int(tokens[0]), int(tokens[-1]) + 1) if contiguous else None,
        count=count,
        past=past,
        ids=torch.from_numpy(step.token_ids[tokens].astype(numpy.int64)).to(device).view(len(rows), count),
        positions=torch.from_numpy(positions).to(device),
        mask=mask,
        slots=torch.from_numpy(step.slots[rows].astype(numpy.int64)).to(device),
        views={
            group.name: _view(step, group, rules.block_tokens, rows, histories, positions, device)
            for group in rules.groups
            if group.kind != "state"
        },
        last=last,
    )


def _view(
    step: Step,
    group: KVGroup,
    block_tokens: int,
    rows: list[int],
    histories: numpy.typing.NDArray[numpy.int64],
    positions: numpy.typing.NDArray[numpy.int64],
    device: torch.device,
) -> BlockView:
    table = step.block_tables[group.name][rows].astype(numpy.int64)
    window = int(histories.max()) if group.window is None else group.window - 1
    lengths = numpy.minimum(histories, window)
    first = histories - lengths
    pieces = [
        table[row, first[row] // block_tokens : -(-histories[row] // block_tokens)] if lengths[row] else table[row, :0]
        for row in range(len(rows))
    ]
    assert min((int(piece.min()) for piece in pieces if len(piece)), default=0) >= 0, "a needed block was dropped"
    written = table[numpy.arange(len(rows))[:, None], positions // block_tokens].reshape(-1)
    sizes = [len(piece) for piece in pieces]
    indices = torch.from_numpy(numpy.concatenate([*pieces, written, (positions % block_tokens).reshape(-1)])).to(device)
    *tables, blocks, offsets = indices.split([*sizes, len(written), len(written)])
    return BlockView(
        past=int(lengths.max()),
        lengths=tuple(lengths.tolist()),
        tables=tuple(tables),
        skips=tuple((first % block_tokens).tolist()),
        blocks=blocks,
        offsets=offsets,
    )
