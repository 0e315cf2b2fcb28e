"""The folders of packed weights on disk: one for a checkpoint in a format, one file for a tensor; found, kept, evicted.

    <cache>/packed/<key>/index.json        what the folder holds, and for which checkpoint
    <cache>/packed/<key>/<name>.packed     one tensor: a line of JSON, then its parts (see ``TensorFile``)

A key stands for everything that the bytes follow from, so a folder is never out of date, only unused: the least
recently used ones go when ``$SPLITRUN_CACHE_LIMIT`` is reached. Files appear whole, by renaming, and are believed only
with the right checksum. Knows bytes, sizes and ages; knows neither torch nor models.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from splitrun.errors import InvalidRequest
from splitrun.folders import cache_folder
from splitrun.quantities import parse_bytes

VERSION = 1
LIMIT_VARIABLE = "SPLITRUN_CACHE_LIMIT"
DEFAULT_LIMIT = "32GiB"
KEPT_FREE_BYTES = 1 << 30
"""Room on the disk that packed weights never take."""
HEADER_LIMIT_BYTES = 1 << 16
ALIGNMENT = 64
PIECE_BYTES = 4 << 20
"""Read and summed at a time: what was just read is then still in the processor's cache."""
INDEX = "index.json"
USED = "used"
"""The names that the last process took from the folder, a list for each of its loads, in their order."""
SUFFIX = ".packed"


class BrokenPack(Exception):
    """A file of packed weights is not what was written: cut short, changed, or foreign."""


@dataclass(frozen=True)
class Part:
    """A run of bytes of a tensor's file."""

    start: int
    nbytes: int
    checksum: int


@dataclass(frozen=True)
class PackEntry:
    """A folder as ``splitrun cache list`` shows it; ``used_s`` is when it was last read or written, since 1970."""

    key: str
    model: str
    format: str
    device: str
    nbytes: int
    tensors: int
    used_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def packed_root() -> Path:
    """Where all packed weights lie."""
    return cache_folder() / "packed"


def limit_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """The most that packed weights may take together. Raises InvalidRequest for a size that is none."""
    try:
        return parse_bytes(environment.get(LIMIT_VARIABLE) or DEFAULT_LIMIT)
    except ValueError as error:
        raise InvalidRequest(
            f"{LIMIT_VARIABLE} is no size: {error}; set it to one such as 20GiB, or 0 for none"
        ) from error


def folder_key(conditions: Mapping[str, Any]) -> str:
    """The name of the folder that holds under exactly these conditions."""
    text = json.dumps({"version": VERSION, **conditions}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def entries(root: Path | None = None) -> list[PackEntry]:
    """What is kept, most recently used first. Folders that cannot be read are listed as such."""
    found = []
    for folder in (root or packed_root()).glob("*/"):
        sizes = _sizes(folder)
        index = read_index(folder) or {}
        try:
            used = (folder / INDEX).stat().st_mtime
        except OSError:
            used = 0.0
        tensors = sum(name.endswith(SUFFIX) for name in sizes)
        model, format, device = (str(index.get(name, "unreadable")) for name in ("model", "format", "device"))
        found.append(PackEntry(folder.name, model, format, device, sum(sizes.values()), tensors, used))
    return sorted(found, key=lambda entry: -entry.used_s)


def _sizes(folder: Path) -> dict[str, int]:
    """File name -> bytes. Others write and delete there too: what vanishes meanwhile is left out."""
    sizes = {}
    with suppress(OSError), os.scandir(folder) as files:
        for file in files:
            with suppress(OSError):
                if file.is_file():
                    sizes[file.name] = file.stat().st_size
    return sizes


def clear(root: Path | None = None, model: str | None = None) -> list[PackEntry]:
    """Delete what is kept, of one model or of all; what was deleted. Raises OSError."""
    root = root or packed_root()
    gone = [entry for entry in entries(root) if model in (None, entry.model)]
    for entry in gone:
        shutil.rmtree(root / entry.key)
    return gone


def make_room(needed: int, key: str, root: Path, limit: int) -> bool:
    """Delete folders other than ``key``, least recently used first, until ``needed`` more bytes may be written.

    False when that cannot be: then nothing is deleted.
    """
    kept = entries(root)
    others = [entry for entry in kept if entry.key != key]
    own = sum(entry.nbytes for entry in kept if entry.key == key)
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free - KEPT_FREE_BYTES
    used = own + sum(entry.nbytes for entry in others)
    if own + needed > limit or needed > free + sum(entry.nbytes for entry in others):
        return False
    while others and (used + needed > limit or needed > free):
        oldest = others.pop()
        shutil.rmtree(root / oldest.key, ignore_errors=True)
        used, free = used - oldest.nbytes, free + oldest.nbytes
    return True


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder, None where there is none that can be read."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) and index.get("version") == VERSION else None


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write a folder's index, making the folder. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": VERSION, **index}, sort_keys=True)
    _replace(folder / INDEX, [text.encode()])


def touch(folder: Path, taken: Sequence[Sequence[str]]) -> None:
    """Note that a folder was used just now, for tensors of these names in one process."""
    try:
        _replace(folder / USED, [json.dumps(taken).encode()])
        os.utime(folder / INDEX, (time.time(), time.time()))
    except OSError:
        return  # a folder of somebody else's: its age is not ours to keep


def last_taken(model: str, formats: Sequence[str]) -> list[list[TensorFile]]:
    """What the last process took of a model's packed weights in main memory, load by load; nothing known: empty."""
    for entry in entries():
        if entry.model == model and entry.device == "cpu" and entry.format in formats:
            folder = packed_root() / entry.key
            try:
                taken = json.loads((folder / USED).read_bytes())
                return [[TensorFile(folder, name) for name in names] for names in taken]
            except (OSError, ValueError, TypeError):
                return []
    return []


class TensorFile:
    """One tensor's file: its header, and where its parts lie."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / (quote(name, safe="") + SUFFIX)
        self.name = name

    def write(self, facts: Mapping[str, Any], parts: Sequence[memoryview]) -> int:
        """Write it whole; its size. Raises OSError, and then leaves nothing behind."""
        sums = [{"nbytes": part.nbytes, "checksum": zlib.crc32(part)} for part in parts]
        header = json.dumps({"version": VERSION, "name": self.name, **facts, "parts": sums}).encode()
        blocks: list[bytes | memoryview] = [_padded(header + b"\n")]
        for part in parts:
            blocks += [part, bytes(-part.nbytes % ALIGNMENT)]
        _replace(self.path, blocks)
        return sum(len(block) if isinstance(block, bytes) else block.nbytes for block in blocks)

    def open(self) -> OpenTensor:
        """Read the header. Raises FileNotFoundError when there is no such file, BrokenPack, or OSError."""
        return OpenTensor(self)


class OpenTensor:
    """A tensor's file, open for reading. A context manager."""

    def __init__(self, file: TensorFile) -> None:
        self._path = file.path
        self._descriptor = os.open(file.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            self.facts, self.parts = self._header(file.name)
        except BrokenPack:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> OpenTensor:
        return self

    def __exit__(self, *unused: object) -> None:
        os.close(self._descriptor)

    def _header(self, name: str) -> tuple[dict[str, Any], list[Part]]:
        line, newline, _ = os.pread(self._descriptor, HEADER_LIMIT_BYTES, 0).partition(b"\n")
        try:
            facts = json.loads(line) if newline else {}
            place = len(_padded(line + b"\n"))
            parts = []
            for part in facts["parts"]:
                parts.append(Part(place, int(part["nbytes"]), int(part["checksum"])))
                place += parts[-1].nbytes + -parts[-1].nbytes % ALIGNMENT
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenPack(f"{self._path} has no header") from error
        if facts.get("version") != VERSION or facts.get("name") != name:
            raise BrokenPack(f"{self._path} is of another version, or of another tensor")
        if os.fstat(self._descriptor).st_size != place:
            raise BrokenPack(f"{self._path} is cut short")
        return facts, parts

    def read(self, part: Part, target: memoryview) -> None:
        """Read a part straight into ``target``, of its size. Raises BrokenPack when it is not what was written."""
        done = checksum = 0
        while done < part.nbytes:
            piece = target[done : done + PIECE_BYTES]
            count = os.preadv(self._descriptor, [piece], part.start + done)
            if not count:
                raise BrokenPack(f"{self._path} is cut short")
            checksum = zlib.crc32(piece[:count], checksum)
            done += count
        if checksum != part.checksum:
            raise BrokenPack(f"{self._path} was changed since it was written")


def _padded(header: bytes) -> bytes:
    return header + bytes(-len(header) % ALIGNMENT)


def _replace(path: Path, blocks: Sequence[bytes | memoryview]) -> None:
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb", buffering=0) as file:
            for block in blocks:
                done, view = 0, memoryview(block)
                while done < view.nbytes:
                    done += file.write(view[done : done + (1 << 30)]) or 0
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
