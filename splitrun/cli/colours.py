"""A plan on a terminal: the words of ``Placement.explain`` with colour for bars, title and what to read first.

Piped, the words come as they are. Knows the marks of the explanation, not what they mean.
"""

from __future__ import annotations

import sys

STYLES = (
    (r"█+", "blue"),
    (r"▓+", "cyan"),
    (r"▒+", "green"),
    (r"░+", "yellow"),
    (r"·{2,}", "bright_black"),
    (r"^(Predicted|Limited by|Note)", "bold"),
    (r"[\d.,]+ tok/s decoding", "bold green"),
    (r"TOO MUCH", "bold red"),
    (r"^  stage  device .*$", "dim"),
)


def show(words: str, err: bool = False) -> None:
    """Print an explanation, coloured where it is read on a terminal."""
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # it was closed by whoever started the command
        return
    if not stream.isatty():
        print(words, file=stream)
        return
    from rich.console import Console
    from rich.text import Text

    text = Text()
    for number, line in enumerate(words.split("\n")):
        part = Text(line, style="bold" if number == 0 else "")
        for pattern, style in STYLES:
            part.highlight_regex(pattern, style)
        text.append_text(part).append("\n")
    Console(file=stream, highlight=False, soft_wrap=True).print(text, end="")
