"""Encoding, chat templates, hidden specials, ends and sampling defaults; directories without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_tokenizers import train, write_model_directory

from splitrun.engine.tokenizer import Tokenizer
from splitrun.errors import InvalidRequest

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_directory)


def test_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("Grüße, 你好 🌍", add_special_tokens=False)) == "Grüße, 你好 🌍"


def test_the_chat_template_ends_where_the_assistant_begins(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat(HELLO)
    text = "".join(tokenizer.token_text(index) for index in ids)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == "user\nHello\nassistant\n"


@pytest.mark.parametrize(
    ("messages", "words"),
    [([{"role": "robot", "content": "x"}], "unknown role robot"), ([{"content": "no role"}], "chat template refused")],
)
def test_a_template_that_refuses_is_an_invalid_request(
    tokenizer: Tokenizer, messages: list[dict[str, str]], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        tokenizer.encode_chat(messages)


def test_a_model_without_template_refuses_chat_by_name_of_the_way_out(tmp_path: Path) -> None:
    backend = train("byte-level")
    backend.chat_template = None
    backend.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        Tokenizer.load(tmp_path).encode_chat(HELLO)


def test_half_a_surrogate_pair_is_an_invalid_request(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("ab\ud800")


def test_a_text_far_beyond_the_limit_is_encoded_in_part_only(tokenizer: Tokenizer) -> None:
    text = "Grüße 你好 " * 20_000
    assert 10 < len(tokenizer.encode(text, at_most=10)) < 10_000
    assert tokenizer.encode("Hello " * 3000, at_most=100_000) == tokenizer.encode("Hello " * 3000)
    spaces = "x" + " " * 9000
    assert tokenizer.encode(spaces, at_most=100_000) == tokenizer.encode(spaces)


def test_a_directory_without_tokenizer_serves_token_ids_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_token_ids == (7,)
    assert tokenizer.decode([1, 2]) == ""
    assert tokenizer.token_text(5) == "token_id:5"
    for refused in (lambda: tokenizer.encode("text"), lambda: tokenizer.encode_chat(HELLO)):
        with pytest.raises(InvalidRequest, match="holds no tokenizer"):
            refused()


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "9"}', '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_refused_with_its_reason(tmp_path: Path, content: str) -> None:
    write_model_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(InvalidRequest, match="cannot be loaded"):
        tokenizer.encode("text")


@pytest.mark.parametrize(
    ("generation", "ends", "defaults"),
    [
        ({"eos_token_id": [9, 4], "temperature": 0.6, "top_p": 0.95}, (9, 4), {"temperature": 0.6, "top_p": 0.95}),
        ({"eos_token_id": 4, "do_sample": False, "temperature": 0.6}, (4,), {"temperature": 0.0}),
        ({"top_k": "many", "repetition_penalty": 1.1}, (4,), {"repetition_penalty": 1.1}),
        ({"top_k": float("nan"), "top_p": 0.0, "temperature": -1, "min_p": True}, (4,), {}),
        ({}, (4,), {}),
    ],
)
def test_ends_and_defaults_come_from_the_models_files(
    tmp_path: Path, generation: dict[str, object], ends: tuple[int, ...], defaults: dict[str, float]
) -> None:
    write_model_directory(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eos_token_ids, tokenizer.sampling_defaults) == (ends, defaults)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_token_bytes_spell_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(train(kind), tmp_path)
    ids = tokenizer.encode("so 龘 it 🦜", add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(index) for index in ids).decode().strip() == "so 龘 it 🦜"


def test_specials_and_ids_beyond_the_vocabulary_have_names(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_text(index) for index in (4, 99_999)] == ["<|im_end|>", "token_id:99999"]
