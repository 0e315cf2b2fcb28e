"""Packed weights: a checkpoint's tensors as an earlier load made them, a `WeightSource` under the module's own names.

What is kept is what a device computes with (codes and scales in its layout, norms in the compute type), so the next
load reads it straight into place. What is absent or broken there is made from the checkpoint again: wrong numbers
never come of it, and one line at most. Knows nothing of plans.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitrun import __version__
from splitrun.errors import MissingWeights
from splitrun.kernels.cpu.arena import ARENA
from splitrun.kernels.cpu.library import kernel, library_path
from splitrun.kernels.formats import QUANTIZED
from splitrun.kernels.weight import Weight, install
from splitrun.model.packed_folder import (
    BrokenPack,
    OpenTensor,
    TensorFile,
    folder_key,
    limit_bytes,
    make_room,
    packed_root,
    read_index,
    touch,
    write_index,
)
from splitrun.model.read_ahead import was_read
from splitrun.model.source import weight_files

READERS = 4
"""Threads that read at once: more than two cores' worth does not read faster, but hides the disk's latency."""
LEAST_BYTES = 32 << 20
"""Less than this is made from the checkpoint as fast as it is read."""
WAITING_WRITES = 2
"""Tensors that may wait to be written: loading does not run far ahead of the disk."""
_LOG = logging.getLogger("splitrun")


class PackedWeights:
    """The packed tensors of one checkpoint in one format for one kind of device. Safe to use from several threads.

    ``conditions`` are all that the bytes follow from; ``about`` is for people.
    """

    quantized = True

    def __init__(self, conditions: Mapping[str, Any], about: Mapping[str, str], device: torch.device) -> None:
        self._root = packed_root()
        self._key = folder_key(conditions)
        self._folder = self._root / self._key
        self._about = about
        self._device = device
        self._index = read_index(self._folder) or {}
        self._warned = False

    @property
    def ties(self) -> dict[str, str]:
        """Tied name -> the name whose tensor it shares, as the checkpoint's own map said."""
        return dict(self._index.get("ties", {}))

    @property
    def initial(self) -> frozenset[str]:
        """Names of buffers that no checkpoint fills."""
        return frozenset(self._index.get("initial", ()))

    def names(self) -> tuple[str, ...]:
        """All names that were ever written."""
        return tuple(self._index.get("names", ()))

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of these are there, or need not be."""
        wanted = {self.ties.get(name, name) for name in names} - self.initial
        return bool(self._index) and all(self._file(name).path.is_file() for name in wanted)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the values."""
        return tuple(self._facts(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values: that in which the device computes with them."""
        found: torch.dtype = getattr(torch, self._facts(name)["dtype"])
        return found

    def nbytes(self, name: str) -> int:
        """Bytes of codes and scales, or of the plain values."""
        with self._open(name) as file:
            return sum(part.nbytes for part in file.parts)

    def stored_format(self, name: str) -> str | None:
        """The quantized format of a tensor, None for a plain one."""
        format = self._facts(name)["format"]
        return None if format is None else str(format)

    def place(self, name: str) -> str:
        """The file."""
        return str(self._file(name).path)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The values, dequantized, or some entries along the first axis."""
        value = self.value(name)
        values = value.dequantize() if isinstance(value, Weight) else value
        return values if rows is None else values[rows]

    def stored(self, name: str, dtype: torch.dtype) -> Weight | None:
        """The tensor as the quantized weight that it is; None for a plain one, or for another compute type."""
        value = self.value(name)
        return value if isinstance(value, Weight) and value.dtype == dtype else None

    def value(self, name: str) -> Weight | Tensor:
        """The tensor as it was loaded, on the device. Raises BrokenPack or MissingWeights."""
        value = self._storage_for(name)
        self._read(name, value)
        return value

    def _storage_for(self, name: str) -> Weight | Tensor:
        with self._open(name) as file:
            value = self._empty(name, file.facts)
            if [tensor.nbytes for tensor in _storage(value)] != [part.nbytes for part in file.parts]:
                raise BrokenPack(f"{self.place(name)} is of another size than its shape")
            return value

    def _read(self, name: str, value: Weight | Tensor) -> None:
        """Read the tensor's parts into its storage, if they were not read to there ahead."""
        with self._open(name) as file:
            for part, tensor in zip(file.parts, _storage(value), strict=True):
                if was_read(self._file(name), part.start, tensor.data_ptr()):
                    continue
                target = tensor if tensor.device.type == "cpu" else torch.empty(part.nbytes, dtype=torch.uint8)
                file.read(part, _bytes(target))
                if target is not tensor:
                    tensor.view(-1).view(torch.uint8).copy_(target)

    def fill(self, model: Any, names: Iterable[str], taken: list[list[str]]) -> int | None:
        """Install these names, several read at a time; the bytes they take. ``taken`` is what this process took before.

        None when one of them is not as it was written: then nothing is installed, and one line has been logged.
        Modifies the model, and ``taken``.
        """
        ties = self.ties
        wanted = [name for name in dict.fromkeys(ties.get(name, name) for name in names) if name not in self.initial]
        cpu = self._device.type == "cpu"
        try:
            size = sum(self._file(name).path.stat().st_size for name in wanted)
            with ExitStack() as reading:
                if cpu:
                    reading.enter_context(ARENA.reserved(size))
                values = {name: self._storage_for(name) for name in wanted}  # in this order, as reading ahead does
                pool = reading.enter_context(ThreadPoolExecutor(READERS if cpu else 1))
                list(pool.map(self._read, values.keys(), values.values()))
        except (BrokenPack, MissingWeights, OSError) as error:
            self._warn(f"packed weights are made again, because {error}")
            return None
        buffers = {name for name, _ in model.named_buffers()}
        for name in names:
            value = values.get(ties.get(name, name))
            if value is not None:
                if isinstance(value, Tensor) and name not in buffers:
                    value = torch.nn.Parameter(value, requires_grad=False)
                install(model, name, value)
        taken.append(wanted)
        touch(self._folder, taken)
        return sum(value.nbytes for value in values.values())

    def writer(self, nbytes: int) -> PackWriter | None:
        """For keeping what is loaded now, ``nbytes`` in all; None where there is no room."""
        limit = limit_bytes()
        if nbytes < LEAST_BYTES:
            return None
        try:
            room = make_room(nbytes, self._key, self._root, limit)
        except OSError as error:
            self._warn(f"packed weights are not kept: {error}")
            return None
        return PackWriter(self._folder, self._about, self._index, self._warn) if room else None

    def _empty(self, name: str, facts: Mapping[str, Any]) -> Weight | Tensor:
        try:
            shape, dtype, format = torch.Size(facts["shape"]), getattr(torch, facts["dtype"]), facts["format"]
            if format is None:
                return torch.empty(shape, dtype=dtype, device=self._device)
            weight = QUANTIZED[format].empty(shape, dtype, self._device)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise BrokenPack(f"{self.place(name)} has another header than was written") from error
        if type(weight).__name__ != facts.get("layout"):
            raise BrokenPack(f"{self.place(name)} has another layout than this device computes with")
        return weight

    def _facts(self, name: str) -> dict[str, Any]:
        with self._open(name) as file:
            return file.facts

    def _file(self, name: str) -> TensorFile:
        return TensorFile(self._folder, name)

    def _open(self, name: str) -> OpenTensor:
        try:
            return self._file(name).open()
        except FileNotFoundError as error:
            raise MissingWeights(f"there is no {self.place(name)}") from error

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning("splitrun: %s", " ".join(text.split()))


class PackWriter:
    """Writes tensors as they are loaded, on a thread of its own. A context manager; leaving it waits for the last.

    A fault (a full disk, a folder that may not be written) ends the writing, never the loading.
    """

    def __init__(self, folder: Path, about: Mapping[str, str], index: Mapping[str, Any], warn: Any) -> None:
        self._folder = folder
        self._index: dict[str, Any] = {**about, **index}
        self._warn = warn
        self._names: dict[str, None] = dict.fromkeys(index.get("names", ()))
        self._waiting: queue.Queue[tuple[str, Weight | Tensor] | None] = queue.Queue(WAITING_WRITES)
        self._faulty = False
        self._thread = threading.Thread(target=self._run, name="splitrun pack", daemon=True)

    def __enter__(self) -> PackWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        self._waiting.put(None)
        self._thread.join()
        if kind is None and not self._faulty:
            self._try(lambda: write_index(self._folder, {**self._index, "names": list(self._names)}))

    def keep(self, name: str, value: Weight | Tensor) -> None:
        """Keep a tensor under its own name. It is not modified, and must not be until the writer is left."""
        if not self._faulty:
            self._waiting.put((name, value))

    def tied(self, ties: Mapping[str, str], initial: Iterable[str]) -> None:
        """Note which names share a tensor with another, and which buffers no checkpoint fills."""
        known = set(self._index.get("initial", ()))
        self._index |= {"ties": {**self._index.get("ties", {}), **ties}, "initial": sorted(known | set(initial))}

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            name, value = item
            if not self._faulty:
                self._try(partial(self._write, name, value))

    def _write(self, name: str, value: Weight | Tensor) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        quantized = isinstance(value, Weight)
        facts = {
            "format": value.format if isinstance(value, Weight) else None,
            "layout": type(value).__name__ if quantized else "plain",
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        TensorFile(self._folder, name).write(facts, [_bytes(tensor.detach().cpu()) for tensor in _storage(value)])
        self._names[name] = None

    def _try(self, action: Any) -> None:
        try:
            action()
        except (OSError, RuntimeError, MemoryError) as error:  # torch's for want of memory is a RuntimeError
            self._faulty = True
            reason = error.strerror if isinstance(error, OSError) else None
            self._warn(f"packed weights are not kept: {reason or error or type(error).__name__} ({self._folder})")


def packed_weights(
    path: Path, fingerprint: str, name: str, weights: str, dtype: torch.dtype, device: torch.device
) -> PackedWeights | None:
    """The packed weights of a model directory in a quantized format; None for formats that load as fast as they are."""
    if weights not in QUANTIZED or not limit_bytes() or not QUANTIZED[weights].empty((16, 64), dtype, device).storage:
        return None
    import transformers

    conditions = {
        "checkpoint": [fingerprint, *_file_states(path)],
        "format": [weights, str(dtype), device.type, kernel() is not None],
        "code": [__version__, transformers.__version__, kernel_version()],
    }
    return PackedWeights(conditions, {"model": name, "format": weights, "device": device.type}, device)


@cache
def kernel_version() -> str:
    """A digest of the code that decides a packed weight's bytes: the compiled library and the formats' definitions."""
    total = hashlib.sha256()
    folder = resources.files("splitrun.kernels")
    for item in (*folder.iterdir(), *(folder / "cpu").iterdir()):
        if item.name.endswith(".py"):
            total.update(item.name.encode() + item.read_bytes())
    library = library_path()
    if library is not None:
        total.update(library.read_bytes())
    return total.hexdigest()[:16]


def _file_states(path: Path) -> list[tuple[str, int, int, int]]:
    """Sizes and times of the files: the fingerprint does not see values that change under equal headers."""
    states = []
    for file in weight_files(path):
        found = file.stat()
        states.append((file.name, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return states


def _storage(value: Weight | Tensor) -> tuple[Tensor, ...]:
    return value.storage if isinstance(value, Weight) else (value,)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    flat: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return flat
