"""Reading safetensors: values, rows, shards, fingerprints, and every way in which a file can be broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from splitrun.errors import CorruptWeights, MissingWeights, ModelError, UnsupportedModel
from splitrun.model.dummy import DummySource
from splitrun.model.safetensors_file import DTYPES
from splitrun.model.source import SafetensorsSource, checkpoint_format, fingerprint

TENSORS = {
    "a.weight": torch.arange(24, dtype=torch.float32).view(6, 4),
    "b.weight": torch.arange(10, dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def tensor(start: int, stop: int, shape: list[int], kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}


def shard(path: Path, split: dict[str, list[str]]) -> None:
    for file, names in split.items():
        save_file({name: TENSORS[name] for name in names}, path / file)
    table = {name: file for file, names in split.items() for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


SHARDS = {"model-1.safetensors": ["a.weight", "empty"], "model-2.safetensors": ["b.weight", "scalar"]}


@pytest.mark.parametrize("sharded", [False, True])
def test_values_shapes_and_rows(sharded: bool, tmp_path: Path) -> None:
    if sharded:
        shard(tmp_path, SHARDS)
    else:
        save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = SafetensorsSource(tmp_path)
    assert sorted(source.names()) == sorted(TENSORS)
    for name, value in TENSORS.items():
        assert torch.equal(source.read(name), value)
        assert (source.shape(name), source.dtype(name)) == (tuple(value.shape), value.dtype)
        assert source.nbytes(name) == value.nbytes
    for rows in (slice(1, 3), slice(0, 6), slice(4, None), slice(2, 2), slice(5, 99)):
        assert torch.equal(source.read("a.weight", rows), TENSORS["a.weight"][rows])
    assert source.place("b.weight") == ("model-2.safetensors" if sharded else "model.safetensors")
    with pytest.raises(MissingWeights, match="no tensor nothing"):
        source.read("nothing")


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_type_of_value(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype)
    save_file({"x": value}, tmp_path / "model.safetensors")
    found = SafetensorsSource(tmp_path).read("x", slice(1, 3))
    assert found.dtype == dtype
    assert torch.equal(found.float(), value[1:3].float())


BROKEN: dict[str, tuple[Callable[[Path], None], type[ModelError], str]] = {
    "nothing in it": (lambda path: (path / "model.safetensors").write_bytes(b"") and None, CorruptWeights, "header"),
    "garbage": (
        lambda path: (path / "model.safetensors").write_bytes(b"garbage " * 99) and None,
        CorruptWeights,
        "head",
    ),
    "a huge header": (lambda path: write(path, {}, length=2**62), CorruptWeights, "header does not fit"),
    "no JSON": (lambda path: write(path, b"{not json"), CorruptWeights, "not JSON"),
    "no table": (lambda path: write(path, []), CorruptWeights, "not a table"),
    "deep JSON": (lambda path: write(path, b"[" * 10**5 + b"]" * 10**5), CorruptWeights, "not JSON"),
    "the same name twice": (
        lambda path: write(path, b'{"x": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "x": 1}'),
        CorruptWeights,
        "appears twice",
    ),
    "truncated": (
        lambda path: write(path, {"x": tensor(0, 16, [4])}, b"\0" * 12),
        CorruptWeights,
        "4 bytes early",
    ),
    "too long": (lambda path: write(path, {"x": tensor(0, 16, [4])}, b"\0" * 17), CorruptWeights, "1 bytes too many"),
    "overlapping": (
        lambda path: write(path, {"x": tensor(0, 16, [4]), "y": tensor(8, 24, [4])}, b"\0" * 24),
        CorruptWeights,
        "tensor y overlaps",
    ),
    "wrong size": (
        lambda path: write(path, {"x": tensor(0, 16, [5])}, b"\0" * 16),
        CorruptWeights,
        "contradicts",
    ),
    "negative place": (lambda path: write(path, {"x": tensor(-16, 0, [4])}), CorruptWeights, "impossible"),
    "negative shape": (lambda path: write(path, {"x": tensor(0, 16, [-4, -1])}), CorruptWeights, "impossible"),
    "shape of 1.0": (
        lambda path: write(path, {"x": {**tensor(0, 4, []), "shape": [1.0]}}),
        CorruptWeights,
        "imposs",
    ),
    "no fields": (lambda path: write(path, {"x": {}}), CorruptWeights, "no type, shape or place"),
    "unknown type": (lambda path: write(path, {"x": tensor(0, 4, [8], "F4")}, b"1234"), UnsupportedModel, "type F4"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, error, message = BROKEN[name]
    make(tmp_path)
    with pytest.raises(error, match=message) as caught:
        SafetensorsSource(tmp_path)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-200])
    with pytest.raises(CorruptWeights, match=r"ends inside tensor a\.weight"):
        source.read("a.weight")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingWeights, match="vanished"):
        source.read("a.weight")


def test_indexes_that_do_not_hold(tmp_path: Path) -> None:
    shard(tmp_path, SHARDS)
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]

    def refused(content: Any, error: type[ModelError], message: str) -> None:
        index.write_text(content if isinstance(content, str) else json.dumps({"weight_map": content}))
        with pytest.raises(error, match=message):
            SafetensorsSource(tmp_path)

    refused("{", CorruptWeights, "not an index")
    refused("{}", CorruptWeights, "not an index")
    refused([1], CorruptWeights, "not an index")
    refused({**table, "c": "model-1.safetensors"}, MissingWeights, "promises c in model-1")
    refused({**table, "b.weight": "model-1.safetensors"}, MissingWeights, r"promises b\.weight in model-1")
    refused({**table, "c": "model-3.safetensors"}, MissingWeights, r"model-3\.safetensors is missing")
    refused({**table, "c": "../model-1.safetensors"}, UnsupportedModel, "names ../model-1")
    refused({**table, "c": "/etc/passwd"}, UnsupportedModel, "names /etc/passwd")
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "model-3.safetensors")
    refused({**table, "a.weight": "model-3.safetensors"}, CorruptWeights, "in both")


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ("pytorch_model.bin", UnsupportedModel, "pickled weights only, and these are refused: they can run code"),
        ("model.gguf", UnsupportedModel, "GGUF"),
        ("adapter_config.json", UnsupportedModel, "adapter"),
        ("README.md", MissingWeights, r"neither model\.safetensors nor"),
    ],
)
def test_directories_without_safetensors(file: str, error: type[ModelError], message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(error, match=message):
        SafetensorsSource(tmp_path)


def test_fingerprints_follow_config_names_and_shapes(tmp_path: Path) -> None:
    def made(config: str, tensors: dict[str, torch.Tensor]) -> str:
        (tmp_path / "config.json").write_text(config)
        save_file(tensors, tmp_path / "model.safetensors")
        return fingerprint(tmp_path)

    first = made("{}", TENSORS)
    assert first == made("{}", TENSORS)
    assert first.startswith("sha256:")
    others = [
        made('{"a": 1}', TENSORS),
        made("{}", {**TENSORS, "c": torch.zeros(1)}),
        made("{}", {**TENSORS, "b.weight": torch.zeros(3)}),
    ]
    assert len({first, *others}) == 4
    (tmp_path / "model.safetensors").unlink()
    assert fingerprint(tmp_path, weights=False) not in {first, *others}


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [([torch.float32], "fp32"), ([torch.bfloat16, torch.int8], "bf16"), ([torch.float16, torch.float16], "fp16")],
)
def test_checkpoint_format_is_that_of_most_values(dtypes: list[torch.dtype], expected: str, tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.zeros(100).to(dtype) for index, dtype in enumerate(dtypes)}
    save_file({**tensors, "norm": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert checkpoint_format(SafetensorsSource(tmp_path)) == expected


def test_dummy_weights_are_the_same_everywhere_and_look_random() -> None:
    shapes = {"layer.weight": (2000, 1500), "other.weight": (2000, 1500), "norm.weight": (64,), "scalar": ()}
    source = DummySource(shapes)
    whole = source.read("layer.weight")
    assert whole.dtype == torch.bfloat16
    assert torch.equal(whole, DummySource(shapes).read("layer.weight"))
    assert torch.equal(source.read("layer.weight", slice(990, 1700)), whole[990:1700])
    assert not torch.equal(whole, source.read("other.weight"))
    assert abs(whole.float().std().item() - 0.02) < 0.001
    assert whole.float().unique().numel() > 1000
    assert torch.equal(source.read("norm.weight"), torch.ones(64, dtype=torch.bfloat16))
    assert source.read("scalar").shape == ()
    assert (source.names(), source.nbytes("layer.weight")) == (tuple(shapes), 6_000_000)
