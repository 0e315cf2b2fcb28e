"""Compiled CUDA kernels are kept on disk, and believed only when they are what was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitrun.kernels.gpu import cuda


def test_a_source_is_compiled_once_for_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, str]] = []

    def compile_(text: str, architecture: str) -> bytes:
        compiled.append((text, architecture))
        return b"code\n" + architecture.encode()

    monkeypatch.setattr(cuda, "_compiled", compile_)
    folder = tmp_path / "kernels"
    for _ in range(2):
        assert cuda.machine_code("a", "sm_80", folder) == b"code\nsm_80"
    assert cuda.machine_code("a", "sm_90", folder) == b"code\nsm_90"
    assert compiled == [("a", "sm_80"), ("a", "sm_90")]
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert cuda.machine_code("a", "sm_80", folder) == b"code\nsm_80"
    assert len(compiled) == 3


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_compiled", lambda text, architecture: b"code")
    (tmp_path / "file").write_text("")
    assert cuda.machine_code("a", "sm_80", tmp_path / "file") == b"code"
