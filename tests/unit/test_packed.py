"""Packed weights on disk: the second load is the first, bit for bit, whatever happens to what was kept."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model
from torch import Tensor

from splitrun.engine.filling import Filling
from splitrun.kernels.cpu import arena
from splitrun.kernels.weight import Weight
from splitrun.model import packed, packed_folder, read_ahead
from splitrun.model.cut import CutModel, CutRange
from splitrun.model.files import resolve
from splitrun.model.packed import PackedWeights, packed_weights
from splitrun.model.packed_folder import entries
from splitrun.model.source import SafetensorsSource
from splitrun.model.structure import inspect

WHOLE = CutRange(True, 0, 2, True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in which small models are kept too."""
    monkeypatch.setenv("SPLITRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)
    return tmp_path / "cache" / "packed"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {name: tmp_path_factory.mktemp(name) for name in ("qwen2", "llama-tied", "qwen3_moe")}
    for name, path in paths.items():
        make_model(name, torch.bfloat16).save_pretrained(path)
    return paths


@dataclass
class Load:
    """Loads of one checkpoint, and how often its tensors were read."""

    path: Path
    reads: list[str]

    def __call__(self, *cuts: CutRange, format: str = "nf4") -> dict[str, Tensor]:
        """All values of fresh stages of those cuts, loaded by one `Filling`."""
        self.reads.clear()
        files = resolve(str(self.path))
        structure = inspect(files.config)
        filling = Filling(files, structure, "weights")
        values: dict[str, Tensor] = {}
        self.nbytes = 0
        for cut in cuts or (WHOLE,):
            model = CutModel(files.config, structure, cut, "bf16", "cpu")
            self.nbytes += filling.fill(model, format, "stage")
            values |= {name: _values(model.skeleton.model, name) for name in model.own_names}
        return values


def _values(model: Any, name: str) -> Tensor:
    owner = model.get_submodule(name.rpartition(".")[0])
    value = getattr(owner, name.rpartition(".")[2])
    return value.dequantize() if isinstance(value, Weight) else value.detach()


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def load(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Load]:
    reads: list[str] = []
    read = SafetensorsSource.read

    def noted(self: SafetensorsSource, name: str, rows: slice | None = None) -> Tensor:
        reads.append(name)
        return read(self, name, rows)

    monkeypatch.setattr(SafetensorsSource, "read", noted)
    return lambda name: Load(checkpoints[name], reads)


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["qwen2", "llama-tied", "qwen3_moe"])
def test_the_second_load_reads_no_tensor_of_the_checkpoint(
    name: str, format: str, load: Callable[[str], Load], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = load(name)
    monkeypatch.setenv("SPLITRUN_CACHE_LIMIT", "0")
    plain = one(format=format)
    assert one.reads
    assert not entries()
    monkeypatch.delenv("SPLITRUN_CACHE_LIMIT")
    first, first_bytes = one(format=format), one.nbytes
    assert one.reads
    second = one(format=format)
    assert not one.reads
    assert _same(first, plain)
    assert _same(second, plain)
    assert one.nbytes == first_bytes
    (entry,) = entries()
    assert (entry.model, entry.format, entry.device) == (str(one.path), format, "cpu")
    assert entry.nbytes >= first_bytes


def test_tied_tensors_are_one_object_and_shared_between_stages(load: Callable[[str], Load]) -> None:
    one = load("llama-tied")
    halves = (CutRange(True, 0, 1, False), CutRange(False, 1, 2, True))
    first, first_bytes = one(*halves), one.nbytes
    again = one(*halves)
    assert _same(again, first)
    assert not one.reads
    assert one.nbytes == first_bytes
    assert _same(one(), first)
    assert one.nbytes == first_bytes


def test_other_cuts_add_what_they_lack(load: Callable[[str], Load]) -> None:
    one = load("qwen2")
    one(CutRange(True, 0, 1, False))
    expected = one()
    assert one.reads
    assert not any(".layers.0." in name for name in one.reads)
    assert _same(one(), expected)
    assert not one.reads


def _truncate(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 70)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def _change(**fields: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        header, _, _ = file.read_bytes().partition(b"\n")
        facts = {**json.loads(header), **fields}
        parts = [bytes(part["nbytes"]) for part in json.loads(header)["parts"]]
        del facts["parts"]
        handle = packed_folder.TensorFile(file.parent, str(facts["name"]))
        handle.path = file
        original = packed_folder.VERSION
        packed_folder.VERSION = facts.pop("version", original)
        try:
            handle.write({name: facts[name] for name in facts if name != "name"}, [memoryview(part) for part in parts])
        finally:
            packed_folder.VERSION = original

    return change


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut short": _truncate,
    "a flipped bit": _flip,
    "empty": lambda file: file.write_bytes(b""),
    "no header": lambda file: file.write_bytes(b"\0" * 5000),
    "not an object": lambda file: file.write_bytes(b"[]\n" + bytes(61)),
    "another version": _change(version=99),
    "another tensor": _change(name="another"),
    "another layout": _change(layout="OtherWeight"),
    "another format": _change(format="other"),
    "another shape": _change(shape=[16, 64]),
    "another type": _change(dtype="no_such_type"),
    "no parts": lambda file: file.write_bytes(b'{"version": 1, "name": "x"}\n' + bytes(36)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_file_costs_one_line_and_is_made_again(
    damage: str, load: Callable[[str], Load], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = load("qwen2")
    expected = one()
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        (file,) = folder.glob(f"*/{name}.packed")
        DAMAGES[damage](file)
    with caplog.at_level(logging.WARNING):
        found = one()
    assert _same(found, expected)
    assert len(caplog.records) == 1
    assert "\n" not in caplog.records[0].getMessage()
    assert "made again" in caplog.records[0].getMessage()
    caplog.clear()
    assert _same(one(), expected)
    assert not one.reads
    assert not caplog.records


@pytest.mark.parametrize("what", ["a tensor", "the index", "a foreign index"])
def test_what_is_missing_is_made_again_without_a_word(
    what: str, load: Callable[[str], Load], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = load("qwen2")
    expected = one()
    (key,) = folder.iterdir()
    if what == "a foreign index":
        (key / "index.json").write_text('{"version": 99}')
    else:
        (key / ("index.json" if what == "the index" else "lm_head.weight.packed")).unlink()
    assert _same(one(), expected)
    assert one.reads
    assert _same(one(), expected)
    assert not one.reads
    assert not caplog.records


def test_a_folder_that_cannot_be_written_costs_one_line(
    load: Callable[[str], Load], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = load("qwen2")
    expected = one()
    (tmp_path / "file").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITRUN_CACHE", str(tmp_path / "file"))
        assert _same(one(), expected)
    assert len(caplog.records) == 1
    assert "not kept" in caplog.records[0].getMessage()


def test_a_full_disk_costs_one_line_and_leaves_no_half_file(
    load: Callable[[str], Load], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = load("qwen2")
    monkeypatch.setenv("SPLITRUN_CACHE_LIMIT", "0")
    expected = one()
    monkeypatch.delenv("SPLITRUN_CACHE_LIMIT")
    written = []
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        written.append(target)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    assert _same(one(), expected)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.records[0].getMessage()
    assert not list(folder.glob("*/.*"))
    monkeypatch.setattr(Path, "replace", replace)
    caplog.clear()
    assert _same(one(), expected)
    assert _same(one(), expected)
    assert not one.reads


def test_want_of_memory_while_writing_does_not_hold_up_loading(
    load: Callable[[str], Load], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(packed.TensorFile, "write", fail)
    assert load("qwen2")()
    assert "packed weights are not kept: can't allocate memory" in caplog.records[0].getMessage()


def test_files_that_vanish_while_they_are_listed_do_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes there, or deletes."""
    (folder / "key").mkdir(parents=True)
    for name, size in (("kept.packed", 5), ("gone.packed", 7)):
        (folder / "key" / name).write_bytes(bytes(size))
    scan = os.scandir

    @contextmanager
    def racing(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        with scan(path) as files:
            found = list(files)
        if Path(path).name == "key":
            Path(path, "gone.packed").unlink()
        yield found

    monkeypatch.setattr(packed_folder.os, "scandir", racing)
    assert [(entry.nbytes, entry.tensors) for entry in entries()] == [(5, 1)]


def test_changed_values_under_equal_headers_are_another_checkpoint(load: Callable[[str], Load], tmp_path: Path) -> None:
    one = load("qwen2")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in one.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    changing = Load(copy, one.reads)
    first = changing()
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-64:] = content[-128:-64]
    weights.write_bytes(content)
    os.utime(weights, (time.time() + 5, time.time() + 5))
    second = changing()
    assert changing.reads
    assert not _same(second, first)


def test_the_least_recently_used_goes_when_the_limit_is_reached(
    load: Callable[[str], Load], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("qwen2", "llama-tied")
    for name in names:
        load(name)()
    for age, name in enumerate(names):
        (entry,) = (entry for entry in entries() if entry.model == str(load(name).path))
        os.utime(folder / entry.key / "index.json", (1000 + age, 1000 + age))
    load("qwen2")()  # used again: the other one is now the older
    monkeypatch.setenv("SPLITRUN_CACHE_LIMIT", str(sum(entry.nbytes for entry in entries()) + 1000))
    load("qwen3_moe")()
    kept = {entry.model for entry in entries()}
    assert str(load("llama-tied").path) not in kept
    assert str(load("qwen3_moe").path) in kept
    before = entries()
    monkeypatch.setenv("SPLITRUN_CACHE_LIMIT", "1000")
    load("llama-tied")()
    assert entries() == before


def test_a_packed_checkpoint_is_a_weight_source(checkpoints: dict[str, Path], load: Callable[[str], Load]) -> None:
    one = load("qwen2")
    expected = one()
    files = resolve(str(one.path))
    source = packed_weights(files.path, files.fingerprint, files.name, "nf4", torch.bfloat16, torch.device("cpu"))
    assert isinstance(source, PackedWeights)
    assert set(source.names()) == set(expected)
    name = "model.layers.0.mlp.up_proj.weight"
    assert source.shape(name) == tuple(expected[name].shape)
    assert source.dtype(name) == torch.bfloat16
    assert source.stored_format(name) == "nf4"
    assert source.stored_format("model.norm.weight") is None
    assert source.stored("model.norm.weight", torch.bfloat16) is None
    assert source.stored(name, torch.float16) is None
    stored = source.stored(name, torch.bfloat16)
    assert stored is not None
    assert stored.nbytes == source.nbytes(name)
    assert torch.equal(source.read(name, slice(16, 33)), expected[name][16:33])
    assert torch.equal(source.read("model.norm.weight"), expected["model.norm.weight"])
    assert packed_weights(files.path, files.fingerprint, "", "bf16", torch.bfloat16, torch.device("cpu")) is None


def test_a_limit_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITRUN_CACHE_LIMIT", "much")
    with pytest.raises(packed_folder.InvalidRequest, match="SPLITRUN_CACHE_LIMIT"):
        packed_folder.limit_bytes()


def test_the_next_start_reads_ahead_what_the_last_one_took(
    load: Callable[[str], Load], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = load("qwen2")
    expected = one()
    monkeypatch.setattr(read_ahead, "SMALL_BYTES", 1)
    monkeypatch.setattr(arena, "SMALL_BYTES", 1)
    halves = CutRange(True, 0, 1, False), CutRange(False, 1, 2, True)
    assert packed_folder.last_taken(str(one.path), ["nf4"]) == []  # written, never read
    one(*halves)
    assert len(packed_folder.last_taken(str(one.path), ["int8", "nf4"])) == len(halves)
    assert packed_folder.last_taken(str(one.path), ["int8"]) == packed_folder.last_taken("another", ["nf4"]) == []

    def ahead() -> int:
        """Parts that are at the address where a load wants them, when all was read ahead."""
        found = []
        real = read_ahead.was_read
        monkeypatch.setattr(packed, "was_read", lambda *asked: found.append(real(*asked)) or found[-1])
        read_ahead.read_ahead(str(one.path), ["nf4"], 1 << 30)
        for thread in [each for each in threading.enumerate() if each.name == "splitrun read ahead"]:
            thread.join()
        assert _same(one(*halves), expected)
        read_ahead.drop_ahead()
        return sum(found)

    assert ahead() == 16  # seven matrices of two layers, embedding and head
    (file,) = folder.glob("*/model.layers.1.mlp.up_proj.weight.packed")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert 8 <= ahead() < 16  # a broken file ends the reading, and its tensor is made again
    (used,) = folder.glob("*/used")
    used.write_text("much")
    assert packed_folder.last_taken(str(one.path), ["nf4"]) == []
    assert ahead() == 0


def test_reading_ahead_lets_python_change_threads_more_often_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(read_ahead, "_fill", lambda aside, files: seen.append(sys.getswitchinterval()))
    usual = sys.getswitchinterval()
    read_ahead._run([(read_ahead.set_aside(1), [])])
    read_ahead.drop_ahead()
    assert seen == [pytest.approx(read_ahead.TURN_S)]
    assert sys.getswitchinterval() == pytest.approx(usual)
