"""A model on a node: from the same path, from the node's own Hub cache, or received from the coordinator.

What is received is kept as files of the true size with holes: headers first, then each tensor when it is read, piece by
piece, so that a node stores what its stages need and nothing twice; pieces that arrived are noted, so that a later
start goes on where this one ended. Runs in a node's process. Knows nothing of stages.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from splitrun.cluster.lines import Parent
from splitrun.errors import ClusterError, ModelError
from splitrun.measure.cache import cache_folder
from splitrun.model.files import HUB_ID, ModelFiles, read_config, resolve
from splitrun.model.quantized_checkpoint import with_quantization
from splitrun.model.source import SafetensorsSource, WeightSource

RECEIVED = "received.txt"
PIECE_BYTES = 64 << 20
"""Most bytes of a tensor that are asked for, and after a cut perhaps received again."""
_LOG = logging.getLogger(__name__)
Fetch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ReceivedFiles(ModelFiles):
    """A model whose tensors are fetched when they are read."""

    fetch: Fetch | None = None

    @cached_property
    def source(self) -> WeightSource:
        """See `ModelFiles`."""
        assert self.fetch is not None, "received files are fetched from somewhere"
        plain = ReceivedSource(self.path, self.fetch)
        return with_quantization(plain, getattr(self.config, "quantization_config", None))


class ReceivedSource(SafetensorsSource):
    """Tensors of files with holes: each is fetched before its first read."""

    def __init__(self, path: Path, fetch: Fetch) -> None:
        super().__init__(path)
        self._fetch = fetch
        self._here = set(_noted(path))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The values, fetched if they are not here yet."""
        file, entry = self._find(name)
        for start in range(entry.start, entry.stop, PIECE_BYTES):
            piece = (file.name, start, min(start + PIECE_BYTES, entry.stop))
            if piece not in self._here:
                self._fetch(*piece)
                note_received(self.path, *piece)
                self._here.add(piece)
        return super().read(name, rows)


def locate(job: dict[str, Any], parent: Parent, device: str) -> ModelFiles:
    """The model that ``job`` names (``source``, ``revision``, ``fingerprint``, ``weights``). ``device``: for messages.

    Raises ClusterError when another model lies under the same path here, ModelError when there is none.
    """
    source, revision, weights = str(job["source"]), job["revision"], bool(job["weights"])
    there = str(job["fingerprint"])
    if not HUB_ID.fullmatch(source) or Path(source).is_dir() or source == "demo":
        if source == "demo" or Path(source).expanduser().is_dir():
            files = resolve(source, revision, weights=weights)
            if files.fingerprint != there:
                fault = (
                    f"{source} is another model for {device} ({files.fingerprint[:19]}…) than on the coordinator "
                    f"({there[:19]}…): copy the same files to both, or remove it there and they are sent"
                )
                _LOG.error(fault)  # the node's side of it
                raise ClusterError(fault)
            return files
    else:
        try:
            files = resolve(source, revision, weights=weights)
            if files.fingerprint == there:
                return files
        except ModelError:
            pass  # neither in the cache nor to be had from the Hub: the coordinator has it
    return _received(source, revision, there, weights, parent)


def _received(source: str, revision: str | None, fingerprint: str, weights: bool, parent: Parent) -> ModelFiles:
    folder = cache_folder() / "received" / hashlib.sha256(fingerprint.encode()).hexdigest()[:24]
    if not (folder / RECEIVED).is_file():
        parent.say(lacks_model=True)
        write_description(folder, parent.answer("description"))

    def fetch(file: str, start: int, stop: int) -> None:
        parent.say(wants=[str(folder), file, start, stop])
        stored = parent.answer("stored")
        if stored != [file, start, stop]:
            raise ClusterError(f"the coordinator could not send {file}: {stored}")

    return ReceivedFiles(source, revision, folder, read_config(folder), weights, fetch=fetch)


def describe_model(files: ModelFiles) -> dict[str, Any]:
    """What stands before the tensors: small files whole, and of the weights their sizes and headers."""
    from splitrun.model.safetensors_file import header_bytes
    from splitrun.model.source import INDEX_FILE, weight_files

    small = ["config.json", "generation_config.json", INDEX_FILE]
    whole = {name: _text(files.path / name) for name in small if (files.path / name).is_file()}
    shards = {}
    for file in weight_files(files.path) if files.weights else []:
        header = header_bytes(file)
        start = len(header).to_bytes(8, "little") + header
        shards[file.name] = [file.stat().st_size, base64.b64encode(start).decode()]
    return {"whole": whole, "shards": shards}


def write_description(folder: Path, described: dict[str, Any]) -> None:
    """The inverse of ``describe_model``: files of the true size, with holes for the tensors. The folder appears whole;
    one that is there already stays, for another process may have received something by then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    for name, text in described["whole"].items():
        (fresh / Path(name).name).write_bytes(base64.b64decode(text))
    for name, (size, start) in described["shards"].items():
        with (fresh / Path(name).name).open("wb") as file:
            file.write(base64.b64decode(start))
            file.truncate(int(size))
    (fresh / RECEIVED).touch()
    try:
        fresh.rename(folder)
    except OSError:
        shutil.rmtree(fresh)
        if not (folder / RECEIVED).is_file():
            raise


def note_received(folder: Path, file: str, start: int, stop: int) -> None:
    """Remember that a range of a file is here."""
    with (folder / RECEIVED).open("a", encoding="utf-8") as notes:
        notes.write(f"{file} {start} {stop}\n")


def _noted(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    for line in (folder / RECEIVED).read_text(encoding="utf-8").splitlines():
        words = line.rsplit(" ", 2)
        if len(words) == 3 and words[1].isdecimal() and words[2].isdecimal():
            found.append((words[0], int(words[1]), int(words[2])))
    return found


def _text(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()
