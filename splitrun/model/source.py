"""Where tensors come from: the `WeightSource`, and the one for a directory of safetensors files.

Names here are the names on disk. Knows nothing of modules; `names` translates.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
from torch import Tensor

from splitrun.errors import CorruptWeights, MissingWeights, UnsupportedModel
from splitrun.kernels.weight import Weight
from splitrun.model.safetensors_file import Entry, header_bytes, read_entry, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class WeightSource(Protocol):
    """Named tensors that are read one at a time.

    A source may hold tensors that are quantized already; `stored` gives those as they are.
    """

    def names(self) -> tuple[str, ...]:
        """All tensor names, in the source's order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the values."""

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values; of a quantized tensor, the type it was quantized from."""

    def nbytes(self, name: str) -> int:
        """Bytes that the tensor takes in the source."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The values, or some entries along the first axis, as a fresh tensor on the CPU."""

    def stored(self, name: str, dtype: torch.dtype) -> Weight | None:
        """The tensor as the quantized weight that it is, for computing in ``dtype``; None for a plain tensor."""

    def stored_format(self, name: str) -> str | None:
        """The quantized format of a tensor, None for a plain one."""

    def place(self, name: str) -> str:
        """Where the tensor lies, for messages."""


class SafetensorsSource:
    """The safetensors files of a model directory: ``model.safetensors`` or the shards that its index names."""

    def __init__(self, path: Path) -> None:
        """Read all headers. Raises MissingWeights, CorruptWeights or UnsupportedModel with the file at fault."""
        self.path = path
        self._entries: dict[str, tuple[Path, Entry]] = {}
        index = _read_index(path)
        for file in weight_files(path):
            for name, entry in read_header(file).items():
                if name in self._entries:
                    other = self._entries[name][0].name
                    raise CorruptWeights(f"{path}: tensor {name} is in both {other} and {file.name}")
                self._entries[name] = (file, entry)
        for name, file_name in (index or {}).items():
            if name not in self._entries or self._entries[name][0].name != PurePosixPath(file_name).name:
                raise MissingWeights(f"{path}: the index promises {name} in {file_name}, where it is not")

    def names(self) -> tuple[str, ...]:
        """All tensor names."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the values."""
        return self._find(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values."""
        return self._find(name)[1].dtype

    def nbytes(self, name: str) -> int:
        """Bytes in the file."""
        entry = self._find(name)[1]
        return entry.stop - entry.start

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The values as a fresh tensor on the CPU."""
        path, entry = self._find(name)
        return read_entry(path, name, entry, rows)

    def stored(self, name: str, dtype: torch.dtype) -> Weight | None:
        """None: plain files hold plain tensors."""
        return None

    def stored_format(self, name: str) -> str | None:
        """None: plain files hold plain tensors."""
        return None

    def place(self, name: str) -> str:
        """The file's name."""
        return self._find(name)[0].name

    def _find(self, name: str) -> tuple[Path, Entry]:
        try:
            return self._entries[name]
        except KeyError:
            raise MissingWeights(f"{self.path} holds no tensor {name}") from None


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up a model, sorted by name. They may still be missing or broken.

    Raises MissingWeights or UnsupportedModel with the reason when the directory names none.
    """
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    index = _read_index(path)
    if index is not None:
        return [path / name for name in sorted(set(index.values()))]
    if any(path.glob("*.gguf")):
        raise UnsupportedModel(f"{path} holds GGUF files, which splitrun does not read: take the safetensors version")
    if any(any(path.glob(pattern)) for pattern in PICKLES):
        raise UnsupportedModel(
            f"{path} holds pickled weights only, and these are refused: they can run code; "
            "convert them with transformers' save_pretrained(..., safe_serialization=True)"
        )
    if (path / "adapter_config.json").is_file():
        raise UnsupportedModel(f"{path} is an adapter, not a model: merge it into its base model first")
    raise MissingWeights(f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}: download the model again")


def fingerprint(path: Path, *, weights: bool = True) -> str:
    """ "sha256:…" over config.json and the headers of all safetensors files: cheap, and changes with names and shapes.

    It does not see changed values. ``weights`` False, for dummy loading: the files need not all be there, and then the
    config alone decides.
    """
    digest = hashlib.sha256()
    digest.update((path / "config.json").read_bytes())
    named = (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file()
    files = weight_files(path) if weights or named else []
    if not weights and not all(file.is_file() for file in files):
        files = []
    for file in files:
        header = header_bytes(file)
        digest.update(f"\n{file.name} {len(header)}\n".encode())
        digest.update(header)
    return f"sha256:{digest.hexdigest()}"


def checkpoint_format(source: WeightSource, names: Iterable[str] | None = None) -> str:
    """The format that a source is stored in: "fp32", "bf16", "fp16", or "int8" and "nf4" when it is quantized already.

    The type that most values have decides.
    """
    values: Counter[str] = Counter()
    known = {torch.float32: "fp32", torch.float64: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    quantized = False
    for name in names if names is not None else source.names():
        format = source.stored_format(name)
        quantized = quantized or format is not None
        format = format or known.get(source.dtype(name))
        if format is not None:
            values[format] += torch.Size(source.shape(name)).numel()
    if quantized:
        return max(("nf4", "int8"), key=lambda format: values[format])
    return values.most_common(1)[0][0] if values else "bf16"


def _read_index(path: Path) -> dict[str, str] | None:
    """Tensor name -> file name of the index, or None when a single file or no index is there."""
    if (path / SINGLE_FILE).is_file() or not (path / INDEX_FILE).is_file():
        return None
    try:
        table = json.loads((path / INDEX_FILE).read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CorruptWeights(f"{path / INDEX_FILE} is not an index of tensors: download it again") from error
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise CorruptWeights(f"{path / INDEX_FILE} is not an index of tensors: download it again")
    for file in table.values():
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or not file.endswith(".safetensors"):
            raise UnsupportedModel(f"{path / INDEX_FILE} names {file}, which is no safetensors file of this model")
    return table
