"""``splitrun cache``: list and clear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitrun.__main__ import main
from splitrun.model.packed_folder import TensorFile, write_index


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPLITRUN_CACHE", str(tmp_path))
    root = tmp_path / "packed"
    for key, model, format in (("a", "/models/one", "nf4"), ("b", "org/two", "int8")):
        write_index(root / key, {"model": model, "format": format, "device": "cpu"})
        TensorFile(root / key, "x").write({"shape": [64]}, [memoryview(bytes(64))])
    (root / "c").mkdir()
    return root


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("/models/one" in line and "nf4" in line for line in lines) == 1
    assert sum("org/two" in line and "int8" in line for line in lines) == 1
    assert sum("unreadable" in line for line in lines) == 1
    assert "SPLITRUN_CACHE_LIMIT" in lines[-1]


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {entry["model"]: entry["tensors"] for entry in found["packed"]} == {
        "/models/one": 1, "org/two": 1, "unreadable": 0,
    }  # fmt: skip
    assert found["nbytes"] == sum(entry["nbytes"] for entry in found["packed"]) > 128


def test_clear_one_then_all(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear", "org/two", "--json"]) == 0
    assert [entry["model"] for entry in json.loads(capsys.readouterr().out)["packed"]] == ["org/two"]
    assert sorted(folder.name for folder in root.iterdir()) == ["a", "c"]
    assert main(["cache", "clear"]) == 0
    assert "2 packed models" in capsys.readouterr().out
    assert not list(root.iterdir())


def test_what_cannot_be_cleared_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", refuse)
    assert main(["cache", "clear"]) == 2
    assert "cannot be cleared: Permission denied" in capsys.readouterr().err
