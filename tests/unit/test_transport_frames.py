"""Frames between stages: everything survives the trip, and nothing else gets in."""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitrun.schedule.flat import MalformedMessage
from splitrun.schedule.request import SamplingParams, TokenLogprob
from splitrun.schedule.step import RowSampling, RowTokens, Step, Tokens
from splitrun.transport.frames import MAX_BODY_BYTES, Frame, Kind, decode, encode
from splitrun.transport.gate import Dropped, Gate
from splitrun.transport.messages import step_frame, step_of, tokens_frame, tokens_of

HEADER_BYTES = 64
SAMPLING = SamplingParams(
    max_tokens=7, temperature=0.7, top_k=3, logit_bias={5: -1.5}, stop=("é",), stop_token_ids=(2,), logprobs=2
)
TOKENS = Tokens(
    9,
    2,
    (
        RowTokens(),
        RowTokens((4,), (TokenLogprob(4, -0.125, ((4, -0.125), (1, -2.0))),)),
        RowTokens((), (), (TokenLogprob(8, -3.5), TokenLogprob(1, -0.1))),
    ),
)


def numbers(*values: int) -> numpy.ndarray:
    return numpy.array(values, numpy.int32)


def make_step(**changes: Any) -> Step:
    """Two rows: an inner prompt chunk of three tokens with scores, and a decoded token with penalties."""
    step = Step(
        index=9,
        epoch=2,
        token_ids=numbers(5, 6, 7, 3),
        query_starts=numbers(0, 3, 4),
        context_lengths=numbers(0, 11),
        slots=numbers(1, 0),
        block_tables={"full": numbers(4, -1, 2, 3).reshape(2, 2), "window": numbers(0, 1).reshape(2, 1)},
        sampling=(None, RowSampling(SAMPLING, 2**63 - 1, 12, (1, 2), (3, 3))),
        prompt_logprobs=(2, None),
        prompt_targets={0: (6, 7, 8)},
        replay=(False, False),
        requests=(70, -1),
        refill=(0, 2),
    )
    return dataclasses.replace(step, **changes)


def same(first: Step, second: Step) -> bool:
    arrays = ("token_ids", "query_starts", "context_lengths", "slots")
    plain = ("index", "epoch", "sampling", "prompt_logprobs", "prompt_targets", "replay", "requests", "refill")
    return (
        all(numpy.array_equal(getattr(first, name), getattr(second, name)) for name in arrays)
        and all(getattr(first, name) == getattr(second, name) for name in plain)
        and list(first.block_tables) == list(second.block_tables)
        and all(numpy.array_equal(first.block_tables[name], second.block_tables[name]) for name in first.block_tables)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None])
def test_a_step_survives_the_trip(dtype: torch.dtype | None) -> None:
    activation = None if dtype is None else torch.randn(4, 6).to(dtype)
    frame = decode(encode(step_frame(77, 3, 5, make_step(), activation)))
    assert (frame.kind, frame.session, frame.stage, frame.first) == (Kind.STEP, 77, 3, 5)
    assert same(step_of(frame), make_step())
    if activation is None:
        assert frame.body is None
    else:
        assert frame.body is not None
        assert frame.body.dtype == dtype
        assert torch.equal(frame.body, activation)


def test_a_strided_activation_survives_the_trip() -> None:
    activation = torch.randn(6, 4).T
    frame = decode(encode(step_frame(1, 0, 0, make_step(), activation)))
    assert frame.body is not None
    assert torch.equal(frame.body, activation)


def test_tokens_survive_the_trip() -> None:
    assert tokens_of(decode(encode(tokens_frame(1, 2, TOKENS)))) == TOKENS


WRONG_STEPS = {
    "rows do not tile": {"query_starts": numbers(0, 3, 3)},
    "rows overlap": {"query_starts": numbers(0, 5, 4)},
    "negative id": {"token_ids": numbers(5, -6, 7, 3)},
    "negative context": {"context_lengths": numbers(0, -1)},
    "negative slot": {"slots": numbers(-1, 0)},
    "block below -1": {"block_tables": {"full": numbers(4, -2).reshape(2, 1)}},
    "too few samplings": {"sampling": (None,)},
    "too many flags": {"replay": (True, True, True)},
    "no such stage computes": {"refill": (-1,)},
    "targets of no row": {"prompt_targets": {7: (1,)}},
    "more targets than tokens": {"prompt_targets": {0: (1, 2, 3, 4)}},
}


@pytest.mark.parametrize("fault", WRONG_STEPS)
def test_a_step_that_contradicts_itself_is_refused(fault: str) -> None:
    frame = decode(encode(step_frame(1, 0, 0, make_step(**WRONG_STEPS[fault]), None)))
    with pytest.raises(MalformedMessage):
        step_of(frame)


def test_an_activation_of_other_tokens_is_refused() -> None:
    frame = decode(encode(step_frame(1, 0, 0, make_step(), torch.zeros(5, 2))))
    with pytest.raises(MalformedMessage, match="other tokens"):
        step_of(frame)


CONTROLS = [
    {"rows": -1}, {"rows": 1.5}, {"rows": True}, {"tokens": None}, {"tables": []}, {"tables": {"full": 1 << 40}},
    {"sampling": 3}, {"sampling": [None, {}]}, {"sampling": [None, {"params": {"evil": 1}}]}, {"targets": [[0]]},
    {"targets": [["0", [1]]]}, {"scores": [None, "1"]}, {"replay": 7},
]  # fmt: skip


@pytest.mark.parametrize("control", CONTROLS, ids=json.dumps)
def test_a_control_part_of_wrong_types_is_refused(control: dict[str, Any]) -> None:
    frame = step_frame(1, 0, 0, make_step(), None)
    with pytest.raises(MalformedMessage):
        step_of(dataclasses.replace(frame, control={**frame.control, **control}))


def sound_parts() -> list[bytes]:
    return [bytes(part) for part in encode(step_frame(77, 3, 5, make_step(), torch.randn(4, 6)))]


def with_field(offset: int, layout: str, value: int) -> list[bytes]:
    head, body = sound_parts()
    return [head[:offset] + struct.pack(layout, value) + head[offset + struct.calcsize(layout) :], body]


WRONG_PARTS = {
    "nothing": [],
    "empty": [b""],
    "three parts": [*sound_parts(), b""],
    "no body": sound_parts()[:1],
    "short body": [sound_parts()[0], sound_parts()[1][:-1]],
    "long body": [sound_parts()[0], sound_parts()[1] + b"\0"],
    "short head": [sound_parts()[0][:-1], sound_parts()[1]],
    "long head": [sound_parts()[0] + b"\0", sound_parts()[1]],
    "magic": with_field(0, "<B", 0),
    "version": with_field(4, "<B", 9),
    "kind": with_field(5, "<B", 99),
    "first after step": with_field(24, "<Q", 2**63),
    "giant control": with_field(40, "<I", 2**32 - 1),
    "giant integers": with_field(44, "<I", 2**32 - 1),
    "giant reals": with_field(48, "<I", 2**32 - 1),
    "giant rows": with_field(52, "<I", 2**32 - 1),
    "giant width": with_field(56, "<I", MAX_BODY_BYTES),
    "dtype": with_field(60, "<B", 9),
}


@pytest.mark.parametrize("fault", WRONG_PARTS)
def test_a_damaged_frame_is_refused(fault: str) -> None:
    with pytest.raises(MalformedMessage):
        decode(WRONG_PARTS[fault])


def test_what_does_not_fit_is_not_sent() -> None:
    for frame in (
        Frame(Kind.BEAT, 2**64),
        Frame(Kind.BEAT, 1, integers=[2**31]),
        Frame(Kind.BEAT, 1, control={"x": float("nan")}),
        Frame(Kind.BEAT, 1, body=torch.zeros(2, 2, dtype=torch.int16)),
        Frame(Kind.BEAT, 1, body=torch.zeros(2)),
    ):
        with pytest.raises(MalformedMessage):
            encode(frame)


def read(parts: list[bytes]) -> None:
    """As a receiver reads: whatever is wrong shows as MalformedMessage alone."""
    try:
        frame = decode(parts)
        if frame.kind is Kind.STEP:
            step_of(frame)
        elif frame.kind is Kind.TOKENS:
            tokens_of(frame)
    except MalformedMessage:
        pass


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=3))
def test_noise_never_crashes(parts: list[bytes]) -> None:
    read(parts)


FRAMES = [sound_parts(), [bytes(part) for part in encode(tokens_frame(1, 2, TOKENS))]]


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(FRAMES), st.data())
def test_a_flipped_byte_never_crashes(parts: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(parts) - 1))
    changed = bytearray(parts[index])
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    read([bytes(changed) if at == index else part for at, part in enumerate(parts)])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FRAMES), st.data())
def test_a_truncated_frame_is_refused(parts: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(parts) - 1))
    cut = [part[: data.draw(st.integers(0, len(part) - 1))] if at == index else part for at, part in enumerate(parts)]
    with pytest.raises(MalformedMessage):
        decode(cut)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=12), st.lists(st.floats(), max_size=4))
def test_any_numbers_are_tokens_or_malformed(integers: list[int], reals: list[float]) -> None:
    try:
        tokens = tokens_of(Frame(Kind.TOKENS, 1, integers=integers, reals=reals))
    except MalformedMessage:
        return
    assert tokens_of(tokens_frame(1, 0, tokens)) == tokens


GATES = {
    "in order": ([(0, 0, 0), (0, 0, 1), (1, 2, 2)], ["run", "run", "run"]),
    "repeated": ([(0, 0, 0), (0, 0, 0)], ["run", "repeated"]),
    "reordered": ([(0, 0, 0), (0, 0, 2), (0, 0, 1)], ["run", "gap", "run"]),
    "the first of an epoch is lost": ([(3, 7, 8)], ["gap"]),
    "stale": ([(1, 4, 4), (0, 0, 3), (1, 4, 5)], ["run", "stale", "run"]),
    "replayed after a fence": ([(0, 0, 0), (1, 1, 1), (0, 0, 0), (1, 1, 1)], ["run", "run", "stale", "repeated"]),
}


@pytest.mark.parametrize("name", GATES)
def test_the_gate_lets_each_step_through_once(name: str) -> None:
    gate = Gate()
    arrivals, verdicts = GATES[name]
    assert [gate.judge(*arrival) for arrival in arrivals] == verdicts


def test_what_was_dropped_is_counted_by_reason() -> None:
    dropped = Dropped()
    for reason in ("stale", "gap", "stale"):
        dropped.add(reason)
    assert dropped.counts() == {"stale": 2, "gap": 1}
