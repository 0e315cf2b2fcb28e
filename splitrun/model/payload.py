"""Hashes of a checkpoint's bytes, and how a fingerprint carries them: "sha256:HEADERS+payload:FILE,FILE,…".

A flipped byte in a safetensors file loads without complaint: headers, which the plain fingerprint covers, do not show
it. Reads whole files, so it is done only when asked for. Knows nothing of placements.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from splitrun.errors import CorruptWeights, MissingWeights
from splitrun.model.source import weight_files

MARK = "+payload:"
DIGITS = 32
BUFFER_BYTES = 4 << 20
READERS = 4


def headers_of(fingerprint: str | None) -> str | None:
    """The fingerprint without the hashes that it may carry."""
    return None if fingerprint is None else fingerprint.partition(MARK)[0]


def with_payload(fingerprint: str, path: Path) -> str:
    """The fingerprint with a hash of every weight file of the directory. Reads them all."""
    return f"{headers_of(fingerprint)}{MARK}{','.join(_hashes(path))}"


def verify(fingerprint: str | None, path: Path, make: str) -> None:
    """Raise CorruptWeights, with the file at fault, when a byte of the weights is not as it was when it was hashed.

    Raises MissingWeights when the fingerprint carries no hashes; ``make`` is the command that makes one which does.
    """
    expected = (fingerprint or "").partition(MARK)[2]
    if not expected:
        raise MissingWeights(f"there are no hashes to verify the weights of {path} against: make them with {make}")
    files, found = weight_files(path), _hashes(path)
    for file, now, before in zip(files, found, expected.split(","), strict=False):
        if now != before:
            raise CorruptWeights(f"{file} changed since it was hashed: download it again, or plan again with {make}")
    if len(found) != len(expected.split(",")):
        raise CorruptWeights(f"{path} has another number of weight files than were hashed: plan again with {make}")


def _hashes(path: Path) -> list[str]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(_hash, weight_files(path)))


def _hash(file: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER_BYTES))
    try:
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                digest.update(buffer[:count])
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise MissingWeights(f"{file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:DIGITS]
