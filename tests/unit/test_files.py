"""From a name to a model's files: directories, the demo, the Hub, and every refusal in one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import COMMIT, FakeHub
from tiny_models import make_model

from splitrun.errors import MissingWeights, ModelError, UnsupportedModel
from splitrun.model.files import resolve
from splitrun.model.source import SafetensorsSource

ASK = """
import sys
from splitrun.errors import ModelError
from splitrun.model.files import resolve
for question in sys.argv[1:]:
    name, revision, weights = question.split("|")
    try:
        files = resolve(name, revision or None, weights=weights == "weights")
        print(files.path, len(files.source.names()), files.stored_format)
    except ModelError as error:
        print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    make_model("llama", torch.bfloat16).save_pretrained(path, max_shard_size="100KB")
    (path / "pytorch_model.bin").write_bytes(b"never fetched")
    return path


@pytest.fixture(scope="module")
def hub(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    directory = tmp_path_factory.mktemp("hub")
    (directory / "owner").mkdir()
    (directory / "owner" / "model").symlink_to(saved)
    (directory / "gated" / "model").mkdir(parents=True)
    (directory / "gated" / "model" / "config.json").write_text("{}")
    pickled = directory / "owner" / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((saved / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    empty = directory / "owner" / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("nothing")
    with FakeHub(directory) as running:
        yield running


def ask(hub: FakeHub, home: Path, *questions: str, **more: str) -> list[str]:
    """What resolve answers, a line each, to "name|revision|weights" in a process whose Hub is the fake one."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    run = subprocess.run(
        [sys.executable, "-c", ASK, *questions],
        env={**environment, **settings, **more},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert len(lines) == len(questions), "an answer has more than one line"
    return lines


def test_the_hub_gives_only_what_is_needed_and_then_works_offline(hub: FakeHub, tmp_path: Path) -> None:
    hub.requests.clear()
    dummy, whole = ask(hub, tmp_path, "owner/model||dummy", "owner/model||weights")
    assert dummy.endswith("21 bf16")
    path, count, stored = whole.split()
    assert path.startswith(str(tmp_path))
    assert COMMIT in path
    assert (count, stored) == ("21", "bf16")
    fetched = [path for path in hub.requests if "resolve" in path]
    assert not [path for path in fetched if path.endswith(".bin")]
    shards = [index for index, path in enumerate(fetched) if path.endswith(".safetensors")]
    assert len(shards) > 1
    assert shards == list(range(len(fetched)))[-len(shards) :], "weights come last, and only when asked for"
    hub.requests.clear()
    again, absent = ask(hub, tmp_path, "owner/model||weights", "owner/other||weights", HF_HUB_OFFLINE="1")
    assert again == whole
    assert absent.startswith("MissingWeights owner/other is not in the cache, and HF_HUB_OFFLINE is set: unset it once")
    assert hub.requests == []


def test_the_hub_says_no_in_one_line(hub: FakeHub, tmp_path: Path) -> None:
    table = {
        "owner/absent||weights": "MissingWeights there is no directory owner/absent",
        "gated/model||weights": "MissingWeights gated/model is gated",
        "owner/pickled||weights": "UnsupportedModel owner/pickled has pickled weights only",
        "owner/empty||weights": "MissingWeights owner/empty has no config.json",
        "owner/model|nowhere|weights": "MissingWeights owner/model has no revision nowhere",
    }
    for answer, expected in zip(ask(hub, tmp_path, *table), table.values(), strict=True):
        assert answer.startswith(expected)


def test_a_hub_that_cannot_be_reached_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = taken.getsockname()[1]
    asked: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", asked.append)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{nobody}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{nobody}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    with pytest.raises(MissingWeights, match="owner/absent is not in the cache, and the Hub cannot be reached"):
        resolve("owner/absent")
    assert asked == []
    assert caplog.text == ""


def test_a_directory_and_the_demo(saved: Path) -> None:
    files = resolve(str(saved))
    assert (files.path, files.stored_format, files.revision) == (saved, "bf16", None)
    assert files.config.model_type == "llama"
    assert isinstance(files.source, SafetensorsSource)
    demo = resolve("demo")
    assert demo.config.model_type == "qwen3"
    assert demo.stored_format == "bf16"


def test_dummy_needs_only_a_config(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    files = resolve(str(tmp_path), weights=False)
    assert len(files.source.names()) == 21
    assert files.fingerprint.startswith("sha256:")
    with pytest.raises(MissingWeights, match=r"neither model\.safetensors"):
        resolve(str(tmp_path)).source.names()


def _config(path: Path, fields: dict[str, object] | str) -> Path:
    path.joinpath("config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (None, MissingWeights, "has no config.json"),
        ("{", UnsupportedModel, "cannot be read as JSON"),
        ("[]", UnsupportedModel, "not a table"),
        ({}, UnsupportedModel, "names no model_type"),
        ({"model_type": "never-seen"}, UnsupportedModel, "does not know the model_type never-seen"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}, UnsupportedModel, "code from its own repository"),
        ({"model_type": "llama", "num_attention_heads": "many"}, UnsupportedModel, "no config of a llama model"),
        ({"model_type": "llama", "num_attention_heads": 0}, UnsupportedModel, "no config of a llama model"),
        ({"model_type": "gpt2", "n_head": 0}, UnsupportedModel, "num_attention_heads is 0: it must be at least 1"),
        ({"model_type": "llama", "num_key_value_heads": 0}, UnsupportedModel, "num_key_value_heads is 0"),
    ],
)
def test_configs_that_are_refused(
    fields: dict[str, object] | str | None, error: type[ModelError], message: str, tmp_path: Path
) -> None:
    if fields is not None:
        _config(tmp_path, fields)
    with pytest.raises(error, match=message) as caught:
        resolve(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("./nowhere", MissingWeights, "there is no directory"),
        ("/no/such/place", MissingWeights, "there is no directory"),
        ("a/b/c", MissingWeights, "there is no directory"),
        ("two words", MissingWeights, "neither a directory"),
        ("weights.gguf", UnsupportedModel, "GGUF"),
        ("", MissingWeights, "neither a directory"),
        ("a" * 300, MissingWeights, "can be no directory: File name too long"),
        ("~nobody-of-that-name/model", MissingWeights, "can be no directory: Could not determine home directory"),
    ],
)
def test_names_that_cannot_be(source: str, error: type[ModelError], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(source)


def test_a_file_instead_of_its_directory(saved: Path) -> None:
    with pytest.raises(MissingWeights, match="give the directory"):
        resolve(str(saved / "config.json"))
