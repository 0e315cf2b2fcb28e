"""Token ids to text as they arrive: whole characters only, stop strings cut, constant work per token.

Decoding a token alone is wrong (characters span tokens; SentencePiece drops a leading space), decoding everything
again for each token is quadratic. So the text of a new token is the difference between decoding a short window with
and without it. Knows nothing of requests or of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_BROKEN = "\ufffd"
_WINDOW = 16
"""Undecided tokens at which text is given out although its end is broken: a character has four bytes at most, so
anything further back is broken for good."""
_CHARACTER_TOKENS = 4


class Decoder(Protocol):
    """The part of a tokenizer that this module needs."""

    special_token_ids: frozenset[int]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids."""


class Detokenizer:
    """Turns one sequence of ids into pieces of text whose concatenation is the decoded whole.

    With ``prompt_ids`` the text continues the prompt: a leading space that SentencePiece would drop at the start of
    a text is kept. The pieces equal the whole wherever the ids spell valid UTF-8; where a byte run turns out broken
    after parts of it were shown, what was shown stays.
    """

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        visible = [index for index in prompt_ids[-64:] if index not in decoder.special_token_ids]
        self._ids: list[int] = visible[-_WINDOW:]
        self._shown = len(self._ids)
        self._shown_text = decoder.decode(self._ids) if self._ids else ""

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is open."""
        if token_id in self._decoder.special_token_ids:
            return ""
        self._ids.append(token_id)
        text = self._decoder.decode(self._ids)
        if text == self._shown_text and len(self._ids) > _WINDOW and not text.endswith(_BROKEN):
            self._ids.pop()  # an id that shows nothing, such as one beyond the vocabulary
            return ""
        if not text.endswith(_BROKEN):
            return self._show(text, len(self._ids)) if text else ""
        if len(self._ids) - self._shown < _WINDOW:
            return ""
        end = len(self._ids)
        for cut in range(end - _CHARACTER_TOKENS, end - 2 * _CHARACTER_TOKENS, -1):
            part = self._decoder.decode(self._ids[:cut])
            if text.startswith(part):
                return self._show(part, cut)
        return self._show(text, end)

    def flush(self) -> str:
        """What is left at the end, a broken character as U+FFFD."""
        return self._show(self._decoder.decode(self._ids), len(self._ids)) if len(self._ids) > self._shown else ""

    def _show(self, text: str, count: int) -> str:
        """Give out ``text``, which the first ``count`` ids decode to, less what was given out; move the window on."""
        common = len(self._shown_text)
        if not text.startswith(self._shown_text):
            pairs = enumerate(zip(text, self._shown_text, strict=False))
            common = next((index for index, (new, old) in pairs if new != old), min(len(text), common))
        piece = text[common:]
        # The ids just shown become the left context, but only if they show something: an empty context would make
        # the next token the first of a text again.
        context = self._decoder.decode(self._ids[self._shown : count])
        if context:
            self._ids = self._ids[self._shown :]
            count -= self._shown
            text = context
        self._shown, self._shown_text = count, text
        return piece


class StopStrings:
    """Finds the stop string that is completed first, wherever token borders lie, and holds back its beginnings."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _fallbacks(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be shown; after a stop string is complete (``found``) only what stands before it."""
        if self.found:
            return ""
        if not self._stops:
            return text
        self._held += text
        start = len(self._held) - len(text)
        for position in range(start, len(self._held)):
            complete = self._advance(self._held[position])
            if complete:
                self.found = True
                shown, self._held = self._held[: position + 1 - complete], ""
                return shown
        keep = max(self._matched)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """The text held back, now that nothing follows."""
        shown, self._held = self._held, ""
        return "" if self.found else shown

    def _advance(self, character: str) -> int:
        """Match one more character; the length of the longest stop string that it completes, else 0."""
        complete = 0
        for index, (stop, fallbacks) in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = fallbacks[matched - 1]
            matched += stop[matched] == character
            self._matched[index] = matched
            if matched == len(stop):
                complete = max(complete, matched)
        return complete


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of a string, the length of its longest proper border (Knuth, Morris and Pratt 1977)."""
    borders = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[matched] != stop[index]:
            matched = borders[matched - 1]
        matched += stop[matched] == stop[index]
        borders[index] = matched
    return borders


class TextStream:
    """The text of one completion as its tokens arrive: whole characters, ends hidden, stop strings cut.

    ``end_token_ids`` are those whose text is hidden when they end the completion. ``stopped`` tells that a stop
    string was found: the caller cancels the request and reports "stop". ``token_starts`` holds, per accepted token,
    the position in the text at which it begins; ``length`` is how much text was given out.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop: Sequence[str] = (),
        end_token_ids: frozenset[int] = frozenset(),
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(decoder, prompt_ids)
        self._stops = StopStrings(stop)
        self._ends = end_token_ids
        self._decoded = 0
        self.length = 0
        self.token_starts: list[int] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._stops.found

    def push(self, token_ids: Sequence[int], finish_reason: str | None = None) -> str:
        """The text that may be shown after these tokens. With a finish reason, everything that is left."""
        shown: list[str] = []
        for index, token_id in enumerate(token_ids):
            if self.stopped:
                break
            self.token_starts.append(self._decoded)
            if finish_reason == "stop" and index == len(token_ids) - 1 and token_id in self._ends:
                break
            piece = self._detokenizer.push(token_id)
            self._decoded += len(piece)
            shown.append(self._stops.push(piece))
        if finish_reason is not None and not self.stopped:
            shown += [self._stops.push(self._detokenizer.flush()), self._stops.flush()]
        text = "".join(shown)
        self.length += len(text)
        return text
