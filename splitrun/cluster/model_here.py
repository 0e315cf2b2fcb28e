"""Gives nodes what they lack of a model: its description, and tensors as they are read there. The coordinator's side.

Knows nothing of stages.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from splitrun.cluster.model_there import describe_model
from splitrun.errors import SplitrunError
from splitrun.model.files import ModelFiles
from splitrun.model.source import weight_files
from splitrun.quantities import format_bytes

if TYPE_CHECKING:
    from splitrun.cluster.nodes import NodeProcess

CHUNK_BYTES = 4 << 20
CHUNKS_UNDER_WAY = 4
"""Together they stay well within Ray's object store."""
TELL_S = 5.0
_LOG = logging.getLogger(__name__)


class Provider:
    """Answers the questions of one node's process about a model."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files
        self._sent_bytes = 0
        self._began = self._told = 0.0

    def job(self) -> dict[str, Any]:
        """What the process must know to look for the model itself."""
        files = self._files
        return {
            "source": files.name,
            "revision": files.revision,
            "fingerprint": files.fingerprint,
            "weights": files.weights,
        }

    def answer(self, process: NodeProcess, message: dict[str, Any]) -> None:
        """Act on a message that asks for something; others are left alone."""
        try:
            if "lacks_model" in message:
                process.tell({"description": describe_model(self._files)})
            elif "wants" in message:
                folder, file, start, stop = message["wants"]
                self._send(process, str(folder), str(file), int(start), int(stop))
                process.tell({"stored": [file, start, stop]})
        except (OSError, SplitrunError, ValueError) as error:
            process.tell({"stored": f"{type(error).__name__}: {error}", "description": {"whole": {}, "shards": {}}})

    def _send(self, process: NodeProcess, folder: str, name: str, start: int, stop: int) -> None:
        known = {file.name: file for file in weight_files(self._files.path)}
        if name not in known:
            raise ValueError(f"{name} is no file of the model")
        under_way: list[Any] = []
        with known[name].open("rb") as file:
            file.seek(start)
            for at in range(start, stop, CHUNK_BYTES):
                data = file.read(min(CHUNK_BYTES, stop - at))
                under_way.append(process.store(folder, name, at, data))
                if len(under_way) == CHUNKS_UNDER_WAY:
                    process.await_stored(under_way.pop(0))
        for one in under_way:
            process.await_stored(one)
        self._tell_progress(process, stop - start)

    def _tell_progress(self, process: NodeProcess, count: int) -> None:
        now = time.monotonic()
        self._began = self._began or now
        self._sent_bytes += count
        if now - self._told > TELL_S:
            self._told = now
            rate = self._sent_bytes / max(now - self._began, 1e-3) / 1e6
            _LOG.warning("%s: %s of weights sent, %.0f MB/s", process.name, format_bytes(self._sent_bytes), rate)
