"""Messages survive the trip exactly; anything else is refused without harm."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitrun.errors import InvalidRequest
from splitrun.schedule.request import Request, SamplingParams, TokenEvent, TokenLogprob
from splitrun.serve import wire
from splitrun.serve.wire import Kind, MalformedMessage, Message, decode, encode

IDS = st.integers(0, 2**31 - 1)
LOGPROB = st.builds(
    TokenLogprob,
    IDS,
    st.floats(max_value=0, allow_nan=False),
    st.lists(st.tuples(IDS, st.floats(max_value=0, allow_nan=False)), max_size=4).map(tuple),
)
EVENT = st.builds(
    TokenEvent,
    request_id=st.integers(0, 2**64 - 1),
    token_ids=st.lists(IDS, max_size=4).map(tuple),
    logprobs=st.lists(LOGPROB, max_size=3).map(tuple),
    prompt_logprobs=st.none() | st.lists(st.none() | LOGPROB, max_size=4).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length", "cancelled", "error"]),
    error=st.none() | st.text(max_size=20),
)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 10_000),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    min_p=st.floats(0, 1),
    logit_bias=st.dictionaries(IDS, st.floats(-100, 100), max_size=3),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    stop_token_ids=st.lists(IDS, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
REQUEST = st.builds(
    Request,
    st.integers(0, 2**64 - 1),
    st.lists(IDS, max_size=9).map(tuple),
    SAMPLING,
    st.lists(IDS, max_size=3).map(tuple),
)


@given(EVENT)
def test_events_survive(event: TokenEvent) -> None:
    assert wire.event_of(decode(encode(wire.event_message(event)))) == event


@given(REQUEST)
def test_requests_survive(request: Request) -> None:
    assert wire.request_of(decode(encode(wire.submit_message(request)))) == request


def read(data: bytes) -> None:
    """Read bytes as either side would; only the errors it handles may escape."""
    try:
        message = decode(data)
        wire.event_of(message)
        wire.request_of(message)
    except (MalformedMessage, InvalidRequest):
        pass


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(data)


@settings(max_examples=300)
@given(
    st.one_of(EVENT.map(wire.event_message), REQUEST.map(wire.submit_message)).map(encode),
    st.integers(0, 2**16),
    st.integers(0, 255),
    st.integers(0, 40),
)
def test_damaged_messages_do_no_harm(data: bytes, where: int, byte: int, cut: int) -> None:
    damaged = bytearray(data)
    damaged[where % len(damaged)] = byte
    read(bytes(damaged))
    read(bytes(damaged[: len(damaged) - cut]))


@settings(max_examples=300)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=12), st.lists(st.floats(), max_size=4))
def test_events_of_arbitrary_numbers_do_no_harm(integers: list[int], reals: list[float]) -> None:
    read(encode(Message(Kind.EVENT, 1, {}, integers, reals)))


VALID = wire.submit_message(Request(1, (5, 6), SamplingParams(max_tokens=3), (4,)))


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": "hot"}, {"max_tokens": 1.5}, {"max_tokens": True}, {"stop": 5}, {"logit_bias": [[1]]},
        {"stop_token_ids": ["x"]}, {"unknown": 1}, {"seed": []}, {"top_p": None}, {"logit_bias": {"1": 2}},
    ],
    ids=str,
)  # fmt: skip
def test_sampling_of_the_wrong_type_is_malformed(changes: dict[str, object]) -> None:
    with pytest.raises(MalformedMessage):
        wire.request_of(dataclasses.replace(VALID, control={**VALID.control, **changes}))


@pytest.mark.parametrize(
    "changes", [{"temperature": -1.0}, {"top_p": float("nan")}, {"n": 0}, {"seed": 2**70}], ids=str
)
def test_sampling_out_of_range_is_an_invalid_request(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        wire.request_of(dataclasses.replace(VALID, control={**VALID.control, **changes}))


@pytest.mark.parametrize("integers", [(), (-1,), (3, 1), (2**31 - 1,)], ids=str)
def test_a_request_whose_end_ids_do_not_fit_is_malformed(integers: tuple[int, ...]) -> None:
    with pytest.raises(MalformedMessage):
        wire.request_of(dataclasses.replace(VALID, integers=integers))


@pytest.mark.parametrize(
    "message",
    [
        Message(Kind.SUBMIT, 1, {}, [2**31]),
        Message(Kind.SUBMIT, 2**64),
        Message(Kind.STATUS, 1, {"x": object()}),
        Message(Kind.STATUS, 1, {"x": "y" * (wire.MAX_CONTROL_BYTES + 1)}),
    ],
    ids=["integer", "request id", "not JSON", "too large"],
)
def test_what_does_not_fit_is_refused_before_it_is_sent(message: Message) -> None:
    with pytest.raises(MalformedMessage):
        encode(message)


@pytest.mark.parametrize(
    "control", [b"[1]", b"{", b"[" * 100_000, b"\xff", b"1" * 5000], ids=["list", "open", "deep", "bytes", "digits"]
)
def test_a_control_part_that_is_no_object_is_refused(control: bytes) -> None:
    data = bytearray(encode(Message(Kind.HELLO)))
    data[16:20] = len(control).to_bytes(4, "little")
    with pytest.raises(MalformedMessage):
        decode(bytes(data) + control)
