"""Parsing and formatting of bytes, seconds and rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitrun.quantities import MAX_BYTES, format_bytes, format_rate, format_seconds, parse_bytes, rate_figure


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GiB", 4 << 30),
        ("350MB", 350_000_000),
        ("1.5 GB", 1_500_000_000),
        ("0.5GiB", 1 << 29),
        (" 12 kib ", 12 << 10),
        ("7", 7),
        ("7b", 7),
        ("3k", 3000),
        ("2M", 2_000_000),
        ("1TiB", 1 << 40),
        ("1024TiB", MAX_BYTES),
        (1024, 1024),
        (0, 0),
        ("0GB", 0),
    ],
)
def test_parse_bytes(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", " ", "GiB", "-1", "-4GiB", "+4GiB", "4 gigs", "4GiBs", "1e9", "0x10", "1,5GB", "1.GB", ".5GB", "inf", "nan",
     "٤GiB", "4 4GiB", "4Gi B", "1025TiB", "9" * 63, "9" * 100, "4GiB\0", -1, MAX_BYTES + 1, True, False],
)  # fmt: skip
def test_parse_bytes_refuses(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"is not a size|is out of range"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (12 << 10, "12.0 KiB"),
        (350 << 20, "350 MiB"),
        ((1 << 20) - 1, "1.00 MiB"),
        (4 << 30, "4.00 GiB"),
        (10239 << 10, "10.0 MiB"),
        (MAX_BYTES, "1024 TiB"),
        (-(4 << 30), "-4.00 GiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 µs"),
        (850e-6, "850 µs"),
        (0.9996e-3, "1.00 ms"),
        (0.00321, "3.21 ms"),
        (0.0125, "12.5 ms"),
        (0.9996, "1.00 s"),
        (3.2, "3.20 s"),
        (42.04, "42.0 s"),
        (99.6, "1 min 40 s"),
        (125, "2 min 5 s"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1.234, "1.23 tok/s"), (31.04, "31.0 tok/s"), (99.96, "100 tok/s"), (1240.4, "1,240 tok/s")],
)
def test_format_rate(rate: float, text: str) -> None:
    assert format_rate(rate) == text
    assert text == f"{rate_figure(rate)} tok/s"


@given(st.integers(0, MAX_BYTES))
def test_plain_counts_are_themselves(count: int) -> None:
    assert parse_bytes(count) == count


@given(st.integers(1, 1023), st.sampled_from(["KiB", "MiB", "GiB"]))
def test_what_is_formatted_can_be_parsed(count: int, unit: str) -> None:
    exact = parse_bytes(f"{count}{unit}")
    assert parse_bytes(format_bytes(exact)) == pytest.approx(exact, rel=0.005)


@given(st.text(max_size=80))
def test_any_text_gives_a_size_or_a_value_error(text: str) -> None:
    try:
        count = parse_bytes(text)
    except ValueError:
        return
    assert 0 <= count <= MAX_BYTES
