"""From what a user names ("demo", a directory, a Hub id) to the model's files on this machine.

Only what is needed is fetched from the Hub: config, tokenizer, and the safetensors files that the index names. Nothing
that could run code is: no pickles, no remote code. Knows nothing of modules.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from splitrun.errors import MissingWeights, UnsupportedModel
from splitrun.model.hub import download_weights, fetch_description
from splitrun.model.quantized_checkpoint import with_quantization
from splitrun.model.source import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsSource,
    WeightSource,
    checkpoint_format,
    fingerprint,
)

DEMO = "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine.

    name     what the user named: goes into placements
    path     directory of config, tokenizer and weights
    config   transformers' config object
    weights  whether the weights are there; without, `source` makes dummy ones
    """

    name: str
    revision: str | None
    path: Path
    config: Any
    weights: bool = True

    @cached_property
    def source(self) -> WeightSource:
        """The tensors, opened once; quantized checkpoints as they are. Raises a ModelError with the file at fault."""
        if self.weights:
            return with_quantization(SafetensorsSource(self.path), getattr(self.config, "quantization_config", None))
        from splitrun.model.dummy import DummySource
        from splitrun.model.skeleton import build_skeleton

        return DummySource.of(build_skeleton(self.config, "bf16").model)

    @cached_property
    def stored_format(self) -> str:
        """ "fp32", "bf16" or "fp16", or "int8" and "nf4" for a checkpoint that is quantized already."""
        return checkpoint_format(self.source)

    @cached_property
    def fingerprint(self) -> str:
        """ "sha256:…" over config and tensor headers."""
        return fingerprint(self.path, weights=self.weights)


def resolve(source: str, revision: str | None = None, *, weights: bool = True) -> ModelFiles:
    """Find a model, fetching it from the Hub when it is neither "demo" nor a directory.

    ``weights`` False leaves the weights where they are, for dummy loading. ``HF_HOME``, ``HF_TOKEN`` and
    ``HF_HUB_OFFLINE`` are honoured. Raises MissingWeights for what is not there, UnsupportedModel for what is refused.
    """
    path = _local(source)
    if path is not None:
        revision = None
    elif HUB_ID.fullmatch(source):
        path = fetch_description(source, revision)
    else:
        raise MissingWeights(f"{source} is neither a directory here nor a name on the Hugging Face Hub")
    config = read_config(path)
    if weights and not _has_weights_locally(source, path):
        download_weights(source, revision, path)
    return ModelFiles(source, revision, path, config, weights)


@contextmanager
def named_in(file: str) -> Iterator[None]:
    """What is missing of a model is told with the file that names it: raises MissingWeights."""
    try:
        yield
    except MissingWeights as error:
        raise MissingWeights(f"{file} names a model that is not here: {error}") from error


def read_config(path: Path) -> Any:
    """transformers' config of a model directory. Raises UnsupportedModel or MissingWeights in one line."""
    fields = _config_fields(path)
    kind = str(fields.get("model_type", ""))
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    if kind not in CONFIG_MAPPING:
        if "auto_map" in fields:
            reason = "it needs code from its own repository, which splitrun does not run"
        elif not kind:
            reason = "config.json names no model_type"
        else:
            reason = f"the installed transformers does not know the model_type {kind}; a newer one may"
        raise UnsupportedModel(f"{path} is refused: {reason}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        _refuse_zeros(config)
        return config
    except (ValueError, ArithmeticError, TypeError, KeyError, AttributeError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModel(f"{path / 'config.json'} is no config of a {kind} model: {reason}") from error


def _refuse_zeros(config: Any) -> None:
    """Raise ValueError for sizes that must be positive: what is made of them divides by them."""
    text = config.get_text_config(decoder=True)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")


def _config_fields(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        fields = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        if any(path.glob("*.gguf")):
            raise UnsupportedModel(f"{path} holds GGUF files: splitrun reads safetensors with their config") from error
        raise MissingWeights(f"{path} has no config.json: give the directory of a Hugging Face model") from error
    except (ValueError, OSError, RecursionError) as error:
        raise UnsupportedModel(f"{file} cannot be read as JSON: download it again") from error
    if not isinstance(fields, dict):
        raise UnsupportedModel(f"{file} is not a table of settings: download it again")
    return fields


def _local(source: str) -> Path | None:
    """The directory that ``source`` means, or None when it may be a name on the Hub."""
    if source == DEMO:
        return Path(__file__).parent.parent / "demo"
    try:
        path = Path(source).expanduser()
        found = bool(source) and path.is_dir()
    except (OSError, RuntimeError) as error:  # a name beyond the system's length, or a user that is not there
        reason = error.strerror if isinstance(error, OSError) else error
        raise MissingWeights(f"{source[:80]!r} can be no directory: {reason}; give a model's") from error
    if found:
        return path
    if path.suffix == ".gguf":
        raise UnsupportedModel(f"{source} is a GGUF file, which splitrun does not read: take the safetensors version")
    if path.is_file():
        raise MissingWeights(f"{source} is a file: give the directory that holds it and its config.json")
    if source.startswith((".", "~", os.sep)) or source.count("/") > 1 or (os.sep != "/" and os.sep in source):
        raise MissingWeights(f"there is no directory {source}")
    return None


def _has_weights_locally(source: str, path: Path) -> bool:
    """Whether nothing is to be fetched: a directory has what it has, and its errors come when it is opened."""
    return _local(source) is not None or ((path / SINGLE_FILE).is_file() and not (path / INDEX_FILE).is_file())
