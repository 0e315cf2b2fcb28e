"""Pieces of text equal the decoded whole, never halve a character, and stop strings are cut wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import train

from splitrun.engine.detokenizer import Detokenizer, StopStrings, TextStream
from splitrun.engine.tokenizer import Tokenizer

KINDS = ("byte-level", "byte-fallback", "metaspace", "wordpiece")
TEXT = st.text(
    alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n.,é你好世🚀👩‍")), max_size=60
)


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer(train(kind), Path("nowhere"))


class CountingDecoder:
    """Counts the ids that the detokenizer decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.special_token_ids = tokenizer.special_token_ids
        self.ids = 0
        self._tokenizer = tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        self.ids += len(token_ids)
        return self._tokenizer.decode(token_ids)


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    return [*[detokenizer.push(index) for index in ids], detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(text=TEXT)
@example(text="  two leading spaces\n\n\n   and   inner ones ")
@example(text="👩‍👩‍👧 family, then \ufffd itself")
@example(text=" ▁ ▁▁ lower blocks")
def test_pieces_equal_the_decoded_whole(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(before=TEXT, after=TEXT)
def test_pieces_continue_the_prompt(kind: str, before: str, after: str) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode(before, add_special_tokens=False)
    ids = tokenizer.encode(after, add_special_tokens=False)
    whole = tokenizer.decode([*prompt, *ids])
    assert tokenizer.decode(prompt) + "".join(pieces_of(tokenizer, ids, prompt)) == whole


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_byte_level_ids_equal_the_decoded_whole(data: st.DataObject) -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = data.draw(st.lists(st.integers(0, 420), max_size=80))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_no_piece_holds_half_a_character(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("𓀀𓁐 ŝĉ 龘𠜎🦜", add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces


def test_a_completion_after_a_prompt_keeps_its_leading_space() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    prompt = tokenizer.encode("The answer is")
    ids = tokenizer.encode("hello")
    assert "".join(pieces_of(tokenizer, ids)) == "hello"
    assert "".join(pieces_of(tokenizer, ids, prompt)) == " hello"


def test_a_prompt_that_ends_inside_a_character_is_completed() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("龘", add_special_tokens=False)
    assert len(ids) == 3
    assert "".join(pieces_of(tokenizer, ids[2:], ids[:2])) == "龘"


def test_a_prompt_that_ends_long_before_its_character_does_is_completed() -> None:
    """Behind enough other ids, and with more than one to come: those in between change nothing of the text."""
    tokenizer = tokenizer_of("byte-level")
    before = tokenizer.encode("The quick brown fox jumps over the lazy dog, and then again: ", add_special_tokens=False)
    ids = tokenizer.encode("\U000e0041 fine", add_special_tokens=False)
    cuts = [cut for cut in range(1, len(ids)) if tokenizer.decode(ids[:cut]) == "\ufffd"]
    assert len(before) > 20
    assert len(cuts) > 1
    for cut in cuts:
        assert "".join(pieces_of(tokenizer, ids[cut:], [*before, *ids[:cut]])).endswith("\U000e0041 fine")


def test_special_tokens_are_hidden_and_keep_spaces_apart() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    hello, end = tokenizer.encode("hello"), 4
    ids = [1, *hello, end, *hello]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids) == "hello hello"


@pytest.mark.parametrize("ids", [[90] * 400, [200] * 400, [5000] * 400, [300, 200] * 200], ids=str)
def test_work_per_token_is_bounded(ids: list[int]) -> None:
    decoder = CountingDecoder(tokenizer_of("byte-level"))
    detokenizer = Detokenizer(decoder)
    for index in ids:
        detokenizer.push(index)
    assert decoder.ids < 200 * len(ids)


STOPS = [
    (["END"], ["hello E", "ND of it"], "hello ", True),
    (["END"], ["hello E", "N", "E", "N", "D"], "hello EN", True),
    (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", True),
    (["aab"], ["aa", "aab"], "aa", True),
    (["abcd", "c"], ["abcd"], "ab", True),
    (["abcd", "c"], ["ab", "c", "d"], "ab", True),
    (["bc", "abc"], ["xabc"], "x", True),
    (["never"], ["nev", "nevnot", "nev"], "nevnevnotnev", False),
    ([], ["plain", " text"], "plain text", False),
    (["🚀"], ["to the ", "🚀 moon"], "to the ", True),
]


@pytest.mark.parametrize(("stops", "pieces", "expected", "found"), STOPS)
def test_stop_strings(stops: list[str], pieces: list[str], expected: str, found: bool) -> None:
    finder = StopStrings(stops)
    shown = "".join(finder.push(piece) for piece in pieces) + finder.flush()
    assert (shown, finder.found) == (expected, found)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab", max_size=40),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    data=st.data(),
)
def test_stop_strings_do_not_depend_on_token_borders(text: str, stops: list[str], data: st.DataObject) -> None:
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    expected = text
    if ends:
        upto = text[: min(ends)]
        expected = upto[: len(upto) - max(len(stop) for stop in stops if upto.endswith(stop))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    finder, shown = StopStrings(stops), ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        shown += finder.push(text[start:end])
        assert expected.startswith(shown), "text was shown that a stop string cuts"
    assert shown + finder.flush() == expected
    assert finder.found == bool(ends)


def test_text_stream_hides_the_end_token_and_reports_where_tokens_start() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("hello 龘", add_special_tokens=False)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    stream = TextStream(tokenizer, end_token_ids=frozenset(newline))
    text = stream.push(ids) + stream.push(newline, "stop")
    assert text == "hello 龘"
    assert len(stream.token_starts) == len(ids) + 1
    assert stream.token_starts == sorted(stream.token_starts)
    assert stream.length == len(text)


def test_text_stream_shows_an_end_token_that_did_not_end_it() -> None:
    tokenizer = tokenizer_of("byte-level")
    newline = tokenizer.encode("\n", add_special_tokens=False)
    stream = TextStream(tokenizer, end_token_ids=frozenset(newline))
    assert stream.push(newline, "length") == "\n"


def test_text_stream_gives_the_rest_at_the_end() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("stay E龘", add_special_tokens=False)
    stream = TextStream(tokenizer, stop=("END",))
    assert stream.push(ids[:-1]) == "stay "
    assert stream.push((), "length") == "E\ufffd"


def test_text_stream_stops_accepting_after_a_stop_string() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("one two three", add_special_tokens=False)
    stream = TextStream(tokenizer, stop=("tw",))
    assert stream.push(ids) == "one "
    assert stream.stopped
    assert len(stream.token_starts) < len(ids)
    assert stream.push(ids, "length") == ""
