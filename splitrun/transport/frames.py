"""The data-plane message between processes: a fixed binary header, bounded parts, raw tensor bytes. No pickle.

    header    magic "SPLS", version, kind, stage, session, epoch, first step of the epoch, step, and the sizes below
    control   JSON object (bounded)
    integers  little-endian int32
    reals     little-endian float64
    body      the activation's bytes, a part of its own, so that they are sent from where they lie

A frame is refused unless every length is exactly what its header says. Knows neither sockets nor what the parts mean.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy
import torch
from torch import Tensor

from splitrun.schedule.flat import MalformedMessage
from splitrun.schedule.step import IntArray

VERSION = 3
MAX_CONTROL_BYTES = 32 << 20
MAX_BODY_BYTES = 1 << 30
MAX_NUMBERS = 1 << 24
_MAGIC = b"SPLS"
_HEADER = struct.Struct("<4sBBHQQQQIIIIIB3x")
_DTYPES: tuple[torch.dtype | None, ...] = (None, torch.float32, torch.bfloat16, torch.float16, torch.int8)

Part = bytes | memoryview


class Kind(IntEnum):
    """What a frame is. STEP goes to a stage (body: the activation, none for the first stage). KV of some tokens goes
    both ways (body: a row per token). The others come back to the coordinator: tokens, a step's failure, a sign of
    life, what was done when, that KV is in its place."""

    STEP = 1
    TOKENS = 2
    FAILURE = 3
    BEAT = 4
    SPANS = 5
    KV = 6
    RESTORED = 7


_KINDS = frozenset(Kind)


@dataclass(frozen=True)
class Frame:
    """One message.

    stage    index of the stage that is to run it, or that sends it
    session  drawn at the engine's start; frames of another are dropped
    first    index of the first step of ``epoch``: whoever starts to listen late knows what was missed
    body     the activation. Shape: (tokens, hidden), contiguous, on the CPU
    """

    kind: Kind
    session: int
    stage: int = 0
    epoch: int = 0
    first: int = 0
    step: int = 0
    control: Mapping[str, Any] = field(default_factory=dict)
    integers: IntArray | Sequence[int] = ()
    reals: Sequence[float] = ()
    body: Tensor | None = None


def encode(frame: Frame) -> list[Part]:
    """The parts of a frame: header with numbers, then the body if there is one. The body's memory is not copied.

    Raises MalformedMessage when a value does not fit.
    """
    try:
        control = json.dumps(frame.control, allow_nan=False).encode() if frame.control else b""
        integers = numpy.asarray(frame.integers, dtype="<i4")
        reals = numpy.asarray(frame.reals, dtype="<f8")
        shape = (0, 0) if frame.body is None else tuple(frame.body.shape)
        rows, width = shape
        kind = _DTYPES.index(None if frame.body is None else frame.body.dtype)
        numbers = (frame.session, frame.epoch, frame.first, frame.step, len(control), integers.size, reals.size)
        header = _HEADER.pack(_MAGIC, VERSION, frame.kind, frame.stage, *numbers, rows, width, kind)
    except (OverflowError, TypeError, ValueError, RecursionError, struct.error) as error:
        raise MalformedMessage(f"a value does not fit the frame: {error}") from error
    parts: list[Part] = [b"".join((header, control, integers.tobytes(), reals.tobytes()))]
    if frame.body is not None:
        parts.append(_bytes_of(frame.body))
    if not _within_bounds(len(control), integers.size, reals.size, 0 if frame.body is None else frame.body.nbytes):
        raise MalformedMessage("the frame is too large")
    return parts


def decode(parts: Sequence[Part]) -> Frame:
    """The frame in the parts, in memory of its own; raises MalformedMessage for anything else."""
    if not 1 <= len(parts) <= 2 or len(parts[0]) < _HEADER.size:
        raise MalformedMessage("these are not the parts of a frame")
    head = parts[0]
    magic, version, kind, stage, session, epoch, first, step, *sizes = _HEADER.unpack_from(head)
    if magic != _MAGIC or version != VERSION or kind not in _KINDS:
        raise MalformedMessage(f"not a frame of version {VERSION}")
    control_bytes, integers, reals, rows, width, dtype = sizes
    if first > step:
        raise MalformedMessage("the step lies before its epoch")
    if dtype >= len(_DTYPES) or (len(parts) == 2) != (_DTYPES[dtype] is not None):
        raise MalformedMessage("the frame has no such body")
    body_type = _DTYPES[dtype]
    body_bytes = rows * width * body_type.itemsize if body_type is not None else 0
    if not _within_bounds(control_bytes, integers, reals, body_bytes):
        raise MalformedMessage("the frame is too large")
    if len(head) != _HEADER.size + control_bytes + 4 * integers + 8 * reals:
        raise MalformedMessage("the parts do not add up to the frame")
    start = _HEADER.size
    control = _control(bytes(head[start : start + control_bytes])) if control_bytes else {}
    start += control_bytes
    return Frame(
        kind=Kind(kind), session=session, stage=stage, epoch=epoch, first=first, step=step, control=control,
        integers=numpy.frombuffer(head, "<i4", integers, start).astype(numpy.int32),
        reals=numpy.frombuffer(head, "<f8", reals, start + 4 * integers).tolist(),
        body=None if body_type is None else _tensor_of(parts[1], rows, width, body_type),
    )  # fmt: skip


def _within_bounds(control_bytes: int, integers: int, reals: int, body_bytes: int) -> bool:
    numbers = max(integers, reals) <= MAX_NUMBERS
    return numbers and control_bytes <= MAX_CONTROL_BYTES and body_bytes <= MAX_BODY_BYTES


def _control(data: bytes) -> dict[str, Any]:
    try:
        control = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage("the control part is not JSON") from error
    if not isinstance(control, dict):
        raise MalformedMessage("the control part is not a JSON object")
    return control


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory as bytes. Every operator of torch costs microseconds here, on the way of each token."""
    if not tensor.numel():
        return memoryview(bytearray())
    return tensor.detach().contiguous().view(torch.uint8).numpy().reshape(-1).data


def _tensor_of(data: Part, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """A tensor with a copy of the bytes. Shape: (rows, width)."""
    if len(data) != rows * width * dtype.itemsize:
        raise MalformedMessage("the activation is not as long as its shape says")
    if not len(data):
        return torch.empty((rows, width), dtype=dtype)
    copied = numpy.frombuffer(data, numpy.uint8).reshape(rows, -1).copy()
    return torch.from_numpy(copied).view(dtype)
