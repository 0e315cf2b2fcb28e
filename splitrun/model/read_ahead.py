"""Reads the packed weights that the last start took while this one still imports, which takes as long.

What was read, with the right checksum, to the very address where a load wants it need not be read again; all else is
read then as usual, so a wrong guess costs time and never correctness. Knows files and addresses, neither torch nor
models.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from splitrun.kernels.cpu.regions import SMALL_BYTES, Aside, aligned, drop_asides, set_aside
from splitrun.model.packed_folder import BrokenPack, OpenTensor, Part, TensorFile, last_taken

TURN_S = 2e-4
"""How long imports keep Python to themselves when the reader wants it, which it does ten times for each tensor. With
Python's own 5 ms the reader mostly waits."""
_read: dict[tuple[str, int], int] = {}
"""(file, where a part starts in it) -> the address that it was read to."""


def read_ahead(model: str, formats: Sequence[str], most_bytes: int) -> None:
    """Begin to read what the last start took of a model in one of the formats, if that is no more than ``most_bytes``.

    On a thread of its own, until the memory is asked for (`Arena.reserved`) or `drop_ahead`.
    """
    loads = last_taken(model, formats)
    try:
        sizes = [sum(file.path.stat().st_size for file in files) for files in loads]
    except OSError:
        return
    if not 0 < sum(sizes) <= most_bytes:
        return
    work = [(set_aside(size), files) for size, files in zip(sizes, loads, strict=True)]
    threading.Thread(target=_run, args=(work,), name="splitrun read ahead", daemon=True).start()


def was_read(file: TensorFile, start: int, address: int) -> bool:
    """Whether the part of the file that starts there lies at that address already. True once."""
    return _read.pop((str(file.path), start), None) == address


def drop_ahead() -> None:
    """Stop reading, and give back what was read in vain."""
    drop_asides()
    _read.clear()


def _run(work: Sequence[tuple[Aside, Sequence[TensorFile]]]) -> None:
    try:
        with _short_turns():
            for aside, files in work:
                _fill(aside, files)
    except (OSError, BrokenPack):
        return  # who loads it finds the same, and says so


@contextmanager
def _short_turns() -> Iterator[None]:
    """Have threads of Python take turns at short intervals meanwhile."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, TURN_S))
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _fill(aside: Aside, files: Sequence[TensorFile]) -> None:
    """Lay the parts out as the arena will: in order, small ones and plain tensors elsewhere."""
    place = 0
    for file in files:
        with file.open() as tensor:
            for part in tensor.parts:
                if tensor.facts["format"] is None or part.nbytes < SMALL_BYTES:
                    continue
                if not aside.fill(place, part.nbytes, partial(_fill_part, file, tensor, part)):
                    return
                place += aligned(part.nbytes)


def _fill_part(file: TensorFile, tensor: OpenTensor, part: Part, target: memoryview, address: int) -> None:
    tensor.read(part, target)
    _read[str(file.path), part.start] = address
