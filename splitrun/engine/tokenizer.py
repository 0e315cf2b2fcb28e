"""Text to token ids and back, the chat template, and what the model's files say about ending and sampling.

Wraps the tokenizer of transformers; never runs code from the model's repository. A directory without a usable
tokenizer still loads: prompts of token ids work, and text is refused with the reason. Knows nothing of the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from splitrun.errors import InvalidRequest
from splitrun.schedule.request import SamplingParams

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
_SAMPLE_CHARACTERS = 8
"""Characters per token that ``encode`` looks at first; ordinary text has 1 to 5."""
TEMPLATE_FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError,
)  # fmt: skip
"""What a chat template raises on messages or options that it was not written for."""
LOADING_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)
"""What transformers raises on a tokenizer's files that are none."""
_ADDED_TOKENS = re.compile(r'"added_tokens"\s*:\s*')
_HEAD_BYTES = 1 << 20
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_character() -> dict[str, int]:
    """The character with which byte-level BPE (GPT-2) writes each byte, inverted: printable bytes stand for
    themselves, the others for the code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _added_tokens(directory: Path) -> dict[str, Any]:
    """The added tokens of tokenizer.json as the argument that spares transformers a pass through all of that file.

    Empty where they come from elsewhere too, or do not stand at the file's start.
    """
    config, others = _read_json(directory / "tokenizer_config.json"), ("added_tokens.json", "special_tokens_map.json")
    if not config or "added_tokens_decoder" in config or any((directory / name).exists() for name in others):
        return {}
    try:
        with (directory / "tokenizer.json").open("rb") as file:
            text = file.read(_HEAD_BYTES).decode("utf-8", errors="replace")
        match = _ADDED_TOKENS.search(text)
        if match is None:
            return {}
        json.loads(text[: match.start()] + '"": 0}')  # the file's own key, not one further inside
        added, _ = json.JSONDecoder().raw_decode(text, match.end())
        return {"added_tokens_decoder": {token.pop("id"): token for token in added}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _ids(value: object) -> list[int]:
    """Token ids from a field that may be absent, a number or a list."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, int) and not isinstance(item, bool)]


class Tokenizer:
    """Text and token ids of one model. Safe to use from several threads.

    ``eos_token_ids`` end a generation; ``special_token_ids`` never show in text; ``sampling_defaults`` holds those of
    temperature, top_k, top_p, min_p and repetition_penalty that the model's generation_config.json sets.
    ``missing_reason`` is empty when text works.
    """

    def __init__(self, backend: Any, directory: Path, missing_reason: str = "") -> None:
        self._backend = backend
        self.missing_reason = missing_reason
        generation = _read_json(directory / "generation_config.json")
        config = _read_json(directory / "config.json")
        ends = _ids(generation.get("eos_token_id", config.get("eos_token_id")))
        self.special_token_ids: frozenset[int] = frozenset()
        self._byte_level = False
        if backend is not None:
            ends += _ids(backend.eos_token_id)
            added = backend.added_tokens_decoder
            special = [index for index, token in added.items() if token.special]
            self.special_token_ids = frozenset([*special, *backend.all_special_ids])
            self._added = frozenset(added)
            self._byte_level = '"ByteLevel"' in _decoder_description(backend)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        self.sampling_defaults = _sampling_defaults(generation)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in a model directory; only reads local files."""
        directory = Path(path)
        if not any((directory / name).exists() for name in _FILES):
            return cls(None, directory, f"{directory} holds no tokenizer: send prompts as token ids")
        from transformers import AutoTokenizer

        try:
            backend = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False, **_added_tokens(directory)
            )
        except Exception as error:  # the library below, which is no Python, raises bare Exception
            if type(error) is not Exception and not isinstance(error, LOADING_FAULTS):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            return cls(None, directory, f"the tokenizer in {directory} cannot be loaded ({reason}): send token ids")
        if getattr(backend, "backend_tokenizer", None) is not None:
            for name in ("_vocab", "_merges"):  # of no use once the Rust tokenizer is made of them; 60 MB of strings
                vars(backend).pop(name, None)
        return cls(backend, directory)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``encode_chat`` can work."""
        return self._backend is not None and bool(self._backend.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True, at_most: int | None = None) -> list[int]:
        """The ids of a text, with the model's own prefix (such as a beginning-of-sequence id) unless switched off.

        A text that clearly has more than ``at_most`` tokens is encoded only as far as that shows: the result then has
        more than ``at_most`` ids, and is not the whole.
        """
        if self._backend is None:
            raise InvalidRequest(self.missing_reason)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text holds half a surrogate pair at character {error.start}") from error
        sample = text if at_most is None else text[: _SAMPLE_CHARACTERS * at_most + 4096]
        ids = [int(index) for index in self._backend.encode(sample, add_special_tokens=add_special_tokens)]
        # The cut itself can only change the last few tokens.
        if len(sample) == len(text) or (at_most is not None and len(ids) > at_most + 256):
            return ids
        return [int(index) for index in self._backend.encode(text, add_special_tokens=add_special_tokens)]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        at_most: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a conversation through the model's chat template, ready for the assistant's answer.

        ``options`` reach the template (such as ``enable_thinking``); ``at_most`` is that of ``encode``. Raises
        InvalidRequest when the model has no template or the template refuses the messages.
        """
        if self._backend is None:
            raise InvalidRequest(self.missing_reason)
        if not self.has_chat_template:
            raise InvalidRequest("this model has no chat template: use /v1/completions with a plain prompt")
        settings: dict[str, Any] = {"add_generation_prompt": True, **(options or {}), "tokenize": False}
        try:
            text = self._backend.apply_chat_template([dict(m) for m in messages], tools=tools or None, **settings)
        except TEMPLATE_FAULTS as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise InvalidRequest(f"the model's chat template refused the messages: {reason}") from error
        return self.encode(str(text), add_special_tokens=False, at_most=at_most)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids, special tokens hidden. Broken characters become U+FFFD; "" without a tokenizer."""
        visible = [index for index in token_ids if index not in self.special_token_ids]
        if self._backend is None or not visible:
            return ""
        return str(self._backend.decode(visible, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """One token as log-probability lists show it: special ones by name, half characters as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which may be part of a character only."""
        piece = None if self._backend is None else self._backend.convert_ids_to_tokens(token_id)
        if piece is None:
            return f"token_id:{token_id}".encode()
        if token_id in self._added:
            return str(piece).encode()
        if self._byte_level and all(character in _BYTE_OF_CHARACTER for character in piece):
            return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
        match = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else str(piece).replace("\u2581", " ").encode()


_BYTE_OF_CHARACTER = _byte_of_character()


def _decoder_description(backend: Any) -> str:
    """The decoder of a tokenizers backend as JSON, "" for one written in Python."""
    rust = getattr(backend, "backend_tokenizer", None)
    state = rust.decoder.__getstate__() if rust is not None and rust.decoder is not None else b""
    return state.decode("utf-8", errors="replace") if isinstance(state, bytes) else str(state)


def _sampling_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    """What generation_config.json says about sampling; greedy when it switches sampling off explicitly.

    A value that no request may have is left out: every request that names none would be refused for it.
    """
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    found = {name: value for name in names if (value := _allowed(name, generation.get(name))) is not None}
    return {"temperature": 0.0} if generation.get("do_sample") is False else found


def _allowed(name: str, value: object) -> float | None:
    """The value, if a request may have it."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    fields: dict[str, Any] = {name: value}
    try:
        SamplingParams(**fields)
    except InvalidRequest:
        return None
    return value
