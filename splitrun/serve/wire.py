"""Messages between the HTTP process and the engine's process: a fixed binary header, then raw arrays.

    header   magic "SPLR", version, kind, request id, and the byte counts of the parts that follow
    control  JSON: sampling parameters, status, error messages (bounded)
    integers little-endian int32: prompts, token ids, counts
    reals    little-endian float64: log-probabilities

Nothing is unpickled, and a message is refused unless its length is exactly what its header says. Knows nothing of
sockets.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy

from splitrun.schedule.flat import MalformedMessage as MalformedMessage
from splitrun.schedule.flat import append_logprobs, read_logprobs, sampling_fields, sampling_of, size
from splitrun.schedule.request import FinishReason, Request, TokenEvent

VERSION = 1
MAX_MESSAGE_BYTES = 64 << 20
MAX_CONTROL_BYTES = 4 << 20
_HEADER = struct.Struct("<4sBBxxQIII")
_MAGIC = b"SPLR"
_FINISH: tuple[FinishReason | None, ...] = (None, "stop", "length", "cancelled", "error")


class Kind(IntEnum):
    """What a message is. The first group goes to the engine, the second comes from it.

    HELLO carries the token. It introduces a peer, is repeated as a sign of life, and is answered with a STATUS.
    """

    HELLO = 1
    SUBMIT = 2
    CANCEL = 3
    EVENT = 16
    REFUSED = 17
    STATUS = 18


@dataclass(frozen=True)
class Message:
    """One message. ``control`` is a JSON object, ``integers`` fit int32."""

    kind: Kind
    request_id: int = 0
    control: Mapping[str, Any] = field(default_factory=dict)
    integers: Sequence[int] = ()
    reals: Sequence[float] = ()


def encode(message: Message) -> bytes:
    """The bytes of a message; raises MalformedMessage when a part is too large or out of range."""
    try:
        control = json.dumps(message.control).encode() if message.control else b""
        integers = numpy.asarray(message.integers, dtype="<i4").tobytes()
        header = _HEADER.pack(
            _MAGIC, VERSION, message.kind, message.request_id, len(control), len(integers), 8 * len(message.reals)
        )
        reals = numpy.asarray(message.reals, dtype="<f8").tobytes()
    except (OverflowError, TypeError, ValueError, RecursionError, struct.error) as error:
        raise MalformedMessage(f"a value does not fit the message: {error}") from error
    data = b"".join((header, control, integers, reals))
    if len(control) > MAX_CONTROL_BYTES or len(data) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"a message of {len(data)} bytes is too large")
    return data


def decode(data: bytes) -> Message:
    """The message in the bytes; raises MalformedMessage for anything else."""
    if not _HEADER.size <= len(data) <= MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"{len(data)} bytes are no message")
    magic, version, kind, request_id, *sizes = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != VERSION or kind not in set(Kind):
        raise MalformedMessage(f"not a message of version {VERSION}")
    control_bytes, integer_bytes, real_bytes = sizes
    if sum(sizes) != len(data) - _HEADER.size or integer_bytes % 4 or real_bytes % 8:
        raise MalformedMessage("the parts do not add up to the message")
    if control_bytes > MAX_CONTROL_BYTES:
        raise MalformedMessage("the control part is too large")
    start = _HEADER.size
    try:
        control = json.loads(data[start : start + control_bytes]) if control_bytes else {}
    except (ValueError, RecursionError) as error:
        raise MalformedMessage("the control part is not JSON") from error
    if not isinstance(control, dict):
        raise MalformedMessage("the control part is not a JSON object")
    start += control_bytes
    integers = numpy.frombuffer(data, "<i4", integer_bytes // 4, start).tolist()
    reals = numpy.frombuffer(data, "<f8", real_bytes // 8, start + integer_bytes).tolist()
    return Message(Kind(kind), request_id, control, integers, reals)


def submit_message(request: Request) -> Message:
    """A request: its sampling parameters as JSON, end ids and prompt as integers."""
    integers = (len(request.eos_token_ids), *request.eos_token_ids, *request.prompt)
    return Message(Kind.SUBMIT, request.request_id, sampling_fields(request.sampling), integers)


def request_of(message: Message) -> Request:
    """The inverse of ``submit_message``; raises MalformedMessage, or InvalidRequest for values out of range."""
    sampling = sampling_of(message.control)
    if not message.integers:
        raise MalformedMessage("the end ids are missing")
    ends = message.integers[0]
    if not 0 <= ends < len(message.integers):
        raise MalformedMessage("the end ids do not fit the message")
    prompt = tuple(message.integers[1 + ends :])
    return Request(message.request_id, prompt, sampling, tuple(message.integers[1 : 1 + ends]))


def event_message(event: TokenEvent) -> Message:
    """A token event. Integers: finish code, count of ids, the ids, then both lists of log-probabilities."""
    integers = [_FINISH.index(event.finish_reason), len(event.token_ids), *event.token_ids]
    reals: list[float] = []
    append_logprobs(event.logprobs, integers, reals)
    integers.append(event.prompt_logprobs is not None)
    append_logprobs(event.prompt_logprobs or (), integers, reals)
    control = {} if event.error is None else {"error": event.error}
    return Message(Kind.EVENT, event.request_id, control, integers, reals)


def event_of(message: Message) -> TokenEvent:
    """The inverse of ``event_message``; raises MalformedMessage."""
    integers, reals = iter(message.integers), iter(message.reals)
    try:
        finish = _FINISH[size(next(integers))]
        token_ids = tuple([next(integers) for _ in range(size(next(integers)))])
        logprobs = tuple(read_logprobs(integers, reals))
        has_prompt = bool(next(integers))
        prompt = tuple(read_logprobs(integers, reals))
        if None in logprobs or next(integers, None) is not None or next(reals, None) is not None:
            raise MalformedMessage("the event does not fill its message")
    except (StopIteration, RuntimeError, IndexError) as error:
        raise MalformedMessage("the event is shorter than it says") from error
    error_text = message.control.get("error")
    return TokenEvent(
        message.request_id, token_ids, tuple(entry for entry in logprobs if entry is not None),
        prompt if has_prompt else None, finish, None if error_text is None else str(error_text),
    )  # fmt: skip
