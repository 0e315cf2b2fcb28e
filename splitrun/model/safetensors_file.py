"""One safetensors file: its header, checked before anything is believed, and tensors read without mapping the file.

A memory map would leave the file's pages resident in the process; here each read goes straight into a fresh tensor and
the pages are given back to the system. Knows nothing of models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitrun.errors import CorruptWeights, MissingWeights, UnsupportedModel

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of values as safetensors names them."""

HEADER_LIMIT_BYTES = 100 * 1024 * 1024
READ_LIMIT_BYTES = 1 << 30


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes [start, stop) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def header_bytes(path: Path) -> bytes:
    """The raw header, without the eight bytes of its length. Raises CorruptWeights when it cannot be one."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
                raise _corrupt(path, "its header does not fit into the file")
            return file.read(length)
    except FileNotFoundError as error:
        raise MissingWeights(f"{path.name} is missing from {path.parent}: download the model again") from error
    except OSError as error:
        raise MissingWeights(f"{path} cannot be read: {error.strerror}") from error


def read_header(path: Path) -> Mapping[str, Entry]:
    """Name -> where that tensor lies.

    Raises MissingWeights when there is no such file, CorruptWeights when header and file contradict each other:
    truncated, garbage, tensors that overlap or reach beyond the end, sizes that do not follow from type and shape.
    """
    raw = header_bytes(path)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON ({str(error)[:80]})") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a table of tensors")
    header.pop("__metadata__", None)
    origin = 8 + len(raw)
    entries = {name: _entry(path, name, fields, origin) for name, fields in header.items()}
    end = origin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise _corrupt(path, f"tensor {name} overlaps another or leaves a gap before it")
        end = entry.stop
    size = path.stat().st_size
    if size < end:
        raise _corrupt(path, f"it ends {end - size} bytes early")
    if size > end:
        raise _corrupt(path, f"it has {size - end} bytes too many")
    return entries


def read_entry(path: Path, name: str, entry: Entry, rows: slice | None = None) -> Tensor:
    """A tensor, or some entries along its first axis. A fresh tensor on the CPU that shares nothing with the file."""
    shape, start = entry.shape, entry.start
    if rows is not None:
        first, last, _ = rows.indices(shape[0])
        row_bytes = (entry.stop - entry.start) // shape[0]
        start += first * row_bytes
        shape = (max(0, last - first), *shape[1:])
    tensor = torch.empty(shape, dtype=entry.dtype)
    if not tensor.numel():
        return tensor
    target = tensor.view(-1).view(torch.uint8).numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            done = 0
            file.seek(start)
            while done < len(target):
                count = file.readinto(target[done : done + READ_LIMIT_BYTES])
                if not count:
                    raise CorruptWeights(f"{path} ends inside tensor {name}: download the file again")
                done += count
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), start, done, os.POSIX_FADV_DONTNEED)
    except FileNotFoundError as error:
        raise MissingWeights(f"{path.name} vanished from {path.parent}: download the model again") from error
    except OSError as error:
        raise CorruptWeights(f"{path} cannot be read at tensor {name}: {error.strerror}") from error
    return tensor


def _entry(path: Path, name: str, fields: Any, origin: int) -> Entry:
    try:
        kind, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, f"tensor {name} has no type, shape or place") from error
    if kind not in DTYPES:
        known = ", ".join(DTYPES)
        raise UnsupportedModel(f"{path.name}: tensor {name} has values of type {kind}; splitrun reads {known}")
    numbers = (*shape, start, stop)
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise _corrupt(path, f"tensor {name} has an impossible shape or place")
    count = 1
    for length in shape:
        count *= length
    if stop - start != count * DTYPES[kind].itemsize:
        raise _corrupt(path, f"tensor {name} has {stop - start} bytes, which its shape {list(shape)} contradicts")
    return Entry(DTYPES[kind], shape, origin + start, origin + stop)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _corrupt(path: Path, reason: str) -> CorruptWeights:
    return CorruptWeights(f"{path} is not a whole safetensors file: {reason}; download it again")
