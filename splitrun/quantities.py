"""Parse and format quantities: bytes, seconds, rates.

    >>> parse_bytes("4GiB"), parse_bytes("350MB"), parse_bytes(1024)
    (4294967296, 350000000, 1024)
    >>> format_bytes(4294967296), format_seconds(0.0125), format_rate(31.04)
    ('4.00 GiB', '12.5 ms', '31.0 tok/s')

Knows nothing of devices or models; raises ``ValueError`` with the reason, which callers turn into their own error.
"""

from __future__ import annotations

import re

_FACTORS = {
    "": 1, "b": 1,
    "k": 1000, "kb": 1000, "m": 1000**2, "mb": 1000**2, "g": 1000**3, "gb": 1000**3, "t": 1000**4, "tb": 1000**4,
    "kib": 1024, "mib": 1024**2, "gib": 1024**3, "tib": 1024**4,
}  # fmt: skip
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", re.ASCII)
MAX_BYTES = 1 << 50
"""One pebibyte: no budget or tensor is larger, so a larger figure is a typing error."""
LEAST_BUDGET_BYTES = 1_000_000


def parse_bytes(text: str | int) -> int:
    """Bytes from "4GiB", "350MB", "1.5 GB" or a plain count; raises ValueError when negative, malformed or absurd."""
    if isinstance(text, bool):
        raise ValueError(f"{text!r} is not a size; write it like 4GiB or 350MB")
    if isinstance(text, int):
        value = text
    else:
        match = _BYTES.fullmatch(text) if len(text) <= 64 else None
        if match is None or match[2].lower() not in _FACTORS:
            raise ValueError(f"{text[:64]!r} is not a size; write it like 4GiB or 350MB")
        value = int(float(match[1]) * _FACTORS[match[2].lower()])
    if not 0 <= value <= MAX_BYTES:
        raise ValueError(f"{text} is out of range; a size lies between 0 and {format_bytes(MAX_BYTES)}")
    return value


def parse_budget(text: str | int) -> int:
    """As ``parse_bytes``, for a device's memory: raises ValueError also where the unit was forgotten: below 1 MB."""
    value = parse_bytes(text)
    if 0 < value < LEAST_BUDGET_BYTES:
        raise ValueError(f"{text} is {format_bytes(value)}, too little for anything; write it with a unit, like 4GiB")
    return value


def format_bytes(count: float) -> str:
    """ "4.00 GiB", "350 MiB", "12 KiB", "17 B": binary units, three significant digits."""
    sign, size = ("-" if count < 0 else ""), abs(float(count))
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1023.5 or unit == "TiB":
            break
        size /= 1024
    if unit == "B":
        return f"{sign}{size:.0f} B"
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{sign}{size:.{decimals}f} {unit}"


def format_seconds(seconds: float) -> str:
    """ "850 µs", "12.5 ms", "3.20 s", "2 min 5 s"."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        milliseconds = seconds * 1e3
        return f"{milliseconds:.{1 if milliseconds >= 9.95 else 2}f} ms"
    if seconds < 99.5:
        return f"{seconds:.{1 if seconds >= 9.95 else 2}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def format_rate(tokens_per_s: float) -> str:
    """Tokens per second: "31.0 tok/s", "1,240 tok/s"."""
    return f"{rate_figure(tokens_per_s)} tok/s"


def rate_figure(tokens_per_s: float) -> str:
    """The same without its unit, for the lower end of an interval: "1,240"."""
    decimals = 0 if tokens_per_s >= 99.95 else 1 if tokens_per_s >= 9.95 else 2
    return f"{tokens_per_s:,.{decimals}f}"
