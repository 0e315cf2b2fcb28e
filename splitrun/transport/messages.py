"""Steps, tokens and KV as frames, and back. Every length and index is checked before an array is made of it.

Knows the fields of a step, not what a stage does with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy
from torch import Tensor

from splitrun.errors import InvalidRequest
from splitrun.schedule.flat import (
    MalformedMessage,
    append_logprobs,
    read_logprobs,
    sampling_fields,
    sampling_of,
    size,
    whole,
)
from splitrun.schedule.request import SamplingParams, TokenLogprob
from splitrun.schedule.step import IntArray, RowSampling, RowTokens, Step, Tokens
from splitrun.transport.frames import Frame, Kind

_BROKEN = (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, InvalidRequest)


def step_frame(session: int, stage: int, first: int, step: Step, activation: Tensor | None) -> Frame:
    """A step on its way to a stage. ``activation`` is on the CPU, Shape: (tokens, hidden)."""
    tables = {name: table.shape[1] for name, table in step.block_tables.items()}
    arrays = [step.token_ids, step.query_starts, step.context_lengths, step.slots]
    arrays += [table.reshape(-1) for table in step.block_tables.values()]
    control: dict[str, Any] = {"rows": step.rows, "tokens": len(step.token_ids), "tables": tables}
    control["sampling"] = [None if row is None else _sampling_fields(row) for row in step.sampling]
    if any(count is not None for count in step.prompt_logprobs):
        control["scores"] = step.prompt_logprobs
    if step.prompt_targets:
        control["targets"] = list(step.prompt_targets.items())
    if any(step.replay):
        control["replay"] = step.replay
    if step.requests:
        control["requests"] = step.requests
    if step.refill:
        control["refill"] = step.refill
    integers = numpy.concatenate(arrays)
    return Frame(Kind.STEP, session, stage, step.epoch, first, step.index, control, integers, (), activation)


def step_of(frame: Frame) -> Step:
    """The step in a frame; raises MalformedMessage."""
    try:
        return _step_of(frame)
    except _BROKEN as error:
        raise MalformedMessage(f"the frame holds no step: {error}") from error


def _step_of(frame: Frame) -> Step:
    control = frame.control
    rows, tokens = size(whole(control["rows"])), size(whole(control["tokens"]))
    widths = {str(name): size(whole(width)) for name, width in control["tables"].items()}
    integers = numpy.asarray(frame.integers, numpy.int32)
    take = _Reader(integers)
    token_ids, starts = take.next(tokens), take.next(rows + 1)
    contexts, slots = take.next(rows), take.next(rows)
    tables = {name: take.next(rows * width).reshape(rows, width) for name, width in widths.items()}
    take.end()
    _require(rows >= 1 and starts[0] == 0 and starts[-1] == tokens, "the rows do not tile the tokens")
    counts = starts[1:] - starts[:-1]
    _require(int(counts.min()) > 0, "a row is empty")
    behind = tokens + 3 * rows + 1  # everything before the tables lies together
    least = integers.min()
    _require(least >= -1, "a block id is below -1")
    _require(least >= 0 or integers[:behind].min() >= 0, "an id or a length is negative")
    _require(frame.body is None or frame.body.shape[0] == tokens, "the activation has other tokens than the step")
    sampling = tuple(None if row is None else _sampling_of(row) for row in control["sampling"])
    scores = tuple(None if count is None else whole(count) for count in control.get("scores", (None,) * rows))
    replay = tuple(bool(flag) for flag in control.get("replay", (False,) * rows))
    requests = tuple([whole(one) for one in control.get("requests", ())])
    refill = tuple([size(whole(one)) for one in control.get("refill", ())])
    _require(len(sampling) == len(scores) == len(replay) == rows, "a list has not one entry per row")
    return Step(
        frame.step, frame.epoch, token_ids, starts, contexts, slots, tables, sampling, scores,
        _targets_of(control.get("targets"), counts), replay, requests, refill,
    )  # fmt: skip


def tokens_frame(session: int, stage: int, tokens: Tokens) -> Frame:
    """What the head chose, on its way to the coordinator."""
    integers: list[int] = [len(tokens.rows)]
    reals: list[float] = []
    for row in tokens.rows:
        integers += [len(row.token_ids), *row.token_ids]
        append_logprobs(row.logprobs, integers, reals)
        append_logprobs(row.prompt_logprobs, integers, reals)
    return Frame(
        Kind.TOKENS, session, stage, tokens.epoch, 0, tokens.step, integers=integers, reals=reals
    )  # fmt: skip


def tokens_of(frame: Frame) -> Tokens:
    """The inverse of ``tokens_frame``; raises MalformedMessage."""
    integers, reals = iter([int(value) for value in frame.integers]), iter(frame.reals)
    try:
        rows = tuple([_row_of(integers, reals) for _ in range(size(next(integers)))])
    except (StopIteration, RuntimeError) as error:
        raise MalformedMessage("the tokens are fewer than they say") from error
    if next(integers, None) is not None or next(reals, None) is not None:
        raise MalformedMessage("the tokens do not fill their frame")
    return Tokens(frame.step, frame.epoch, rows)


@dataclass(frozen=True)
class KVRows:
    """KV of consecutive tokens of one request at a stage, from the token ``start`` on.

    rows    Shape: (tokens, values), as the stage exports them
    slot, tables  the sequence's slot and blocks in each group; on the way to a stage
    """

    request: int
    start: int
    rows: Tensor
    slot: int = 0
    tables: Mapping[str, IntArray] = field(default_factory=dict)


def kv_frame(session: int, stage: int, epoch: int, number: int, kv: KVRows) -> Frame:
    """KV on its way from a stage, or to one; ``number`` tells such frames apart."""
    control = {"request": kv.request, "start": kv.start, "slot": kv.slot}
    tables = {"tables": {name: len(table) for name, table in kv.tables.items()}}
    integers = numpy.concatenate([*kv.tables.values()]) if kv.tables else ()
    return Frame(Kind.KV, session, stage, epoch, 0, number, {**control, **tables}, integers, (), kv.rows)


def kv_of(frame: Frame) -> KVRows:
    """The inverse of ``kv_frame``; raises MalformedMessage."""
    try:
        take = _Reader(numpy.asarray(frame.integers, numpy.int32))
        widths = frame.control["tables"].items()
        tables = {str(name): take.next(size(whole(width))) for name, width in widths}
        take.end()
        start, slot = size(whole(frame.control["start"])), size(whole(frame.control["slot"]))
        if frame.body is None:
            raise MalformedMessage("the frame holds no rows")
        return KVRows(whole(frame.control["request"]), start, frame.body, slot, tables)
    except _BROKEN as error:
        raise MalformedMessage(f"the frame holds no KV: {error}") from error


def _row_of(integers: Iterator[int], reals: Iterator[float]) -> RowTokens:
    ids = tuple([next(integers) for _ in range(size(next(integers)))])
    return RowTokens(ids, _complete(integers, reals), _complete(integers, reals))


def _complete(integers: Iterator[int], reals: Iterator[float]) -> tuple[TokenLogprob, ...]:
    entries = list(read_logprobs(integers, reals))
    found = tuple(entry for entry in entries if entry is not None)
    _require(len(found) == len(entries), "a log-probability is missing")
    return found


class _Reader:
    """Takes arrays off a flat one, and notices when it is too short or too long."""

    def __init__(self, numbers: IntArray) -> None:
        self._numbers = numbers
        self._at = 0

    def next(self, count: int) -> IntArray:
        """The next ``count`` numbers."""
        _require(self._at + count <= len(self._numbers), "the step is longer than its frame")
        self._at += count
        return self._numbers[self._at - count : self._at]

    def end(self) -> None:
        """Everything must have been taken."""
        _require(self._at == len(self._numbers), "the step does not fill its frame")


def _sampling_fields(row: RowSampling) -> dict[str, Any]:
    fields = {"params": sampling_fields(row.params), "seed": row.seed, "position": row.position}
    return fields | {"prompt": row.prompt_ids, "output": row.output_ids}


def _sampling_of(fields: Mapping[str, Any]) -> RowSampling:
    prompt, output = (tuple([whole(token) for token in fields[name]]) for name in ("prompt", "output"))
    return RowSampling(
        _params_of(json.dumps(fields["params"])), whole(fields["seed"]), whole(fields["position"]), prompt, output
    )


@lru_cache(maxsize=1024)
def _params_of(text: str) -> SamplingParams:
    """Sampling parameters from JSON. They are the same in every step of a request: checking them once is enough."""
    return sampling_of(json.loads(text))


def _targets_of(entries: Any, counts: IntArray) -> dict[int, tuple[int, ...]] | None:
    if entries is None:
        return None
    targets = {whole(row): tuple([size(whole(token)) for token in tokens]) for row, tokens in entries}
    known = all(0 <= row < len(counts) and len(tokens) <= counts[row] for row, tokens in targets.items())
    _require(known, "the targets do not match the rows")
    return targets


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise MalformedMessage(fault)
