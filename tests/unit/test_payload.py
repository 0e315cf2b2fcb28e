"""Hashes of weights: a flipped byte is found, and named, before anything loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import make_model

from splitrun import Placement
from splitrun.__main__ import main
from splitrun.errors import CorruptWeights, MissingWeights
from splitrun.model.payload import headers_of, verify, with_payload
from splitrun.model.source import fingerprint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in two shards or more."""
    path = tmp_path_factory.mktemp("model")
    make_model("qwen2", torch.bfloat16).save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-10] ^= 64
    file.write_bytes(content)


def test_a_flipped_byte_is_found_in_its_shard(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    mark = with_payload(fingerprint(copy), copy)
    assert headers_of(mark) == headers_of(headers_of(mark)) == fingerprint(copy)
    verify(mark, copy, "plan")
    broken = sorted(copy.glob("*.safetensors"))[1]
    flip(broken)
    assert fingerprint(copy) == headers_of(mark)  # the headers do not show it
    with pytest.raises(CorruptWeights, match=broken.name):
        verify(mark, copy, "plan")
    assert with_payload(mark, copy) != mark


@pytest.mark.parametrize("mark", [None, "sha256:00"])
def test_without_hashes_the_command_that_makes_them_is_named(mark: str | None, model: Path) -> None:
    with pytest.raises(MissingWeights, match="splitrun plan"):
        verify(mark, model, "splitrun plan")


def test_another_number_of_files(model: Path) -> None:
    mark = with_payload("sha256:00", model)
    with pytest.raises(CorruptWeights, match="another number"):
        verify(mark + ",00", model, "plan")


def test_a_file_that_cannot_be_read(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    sorted(copy.glob("*.safetensors"))[0].unlink()
    with pytest.raises(MissingWeights, match="cannot be read"):
        with_payload("sha256:00", copy)


def test_from_plan_to_check(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("splitrun.measure.gather.measure", lambda files, structure, facts, *others: facts)
    copy, file = Path(shutil.copytree(model, tmp_path / "copy")), tmp_path / "plan.yaml"
    options = ["--memory", "cpu=4GiB", "--context", "32", "--weights", "bf16", "-o", str(file)]
    assert main(["plan", str(copy), *options]) == 0
    assert main(["check", str(file), "--verify"]) == 2
    assert "--hash" in capsys.readouterr().err
    assert main(["plan", str(copy), *options, "--hash"]) == 0
    assert headers_of(Placement.load(file).model.fingerprint) == fingerprint(copy)
    assert main(["check", str(file), "--verify"]) == 0
    assert main(["run", str(copy), "x", "--verify"]) == 2
    assert "--hash" in capsys.readouterr().err
    flip(sorted(copy.glob("*.safetensors"))[0])
    assert main(["check", str(file)]) == 0
    for command in (["check", str(file)], ["run", str(file), "x"]):
        assert main([*command, "--verify"]) == 2
        assert "changed since it was hashed" in capsys.readouterr().err
