"""A plan on a terminal and in a pipe: the same words, with and without colour."""

from __future__ import annotations

import io
import re
import sys

import pytest

from splitrun.cli.colours import show

WORDS = "model · 8 layers\n\n  cpu  ██▓░--··  1 GiB of 2 GiB: 1 MiB TOO MUCH\n\nPredicted   8 tok/s decoding (125 ms)"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_piped_words_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    show(WORDS)
    assert capsys.readouterr().out == WORDS + "\n"


def test_nothing_is_said_where_the_output_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of >&-
    show(WORDS)


def test_a_terminal_gets_the_same_words_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(WORDS)
    assert "\x1b[" in terminal.getvalue()
    assert re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()) == WORDS + "\n"
