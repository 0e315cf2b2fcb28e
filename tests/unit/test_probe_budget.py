"""Budgets: what ``--memory`` may say, and what is left to the system when it says nothing."""

import pytest

from splitrun.errors import InvalidPlacement
from splitrun.measure.budget import default_budget_bytes, named_budgets, parse_memory

GIB, MIB = 1 << 30, 1 << 20
TOTALS = {"cpu": 16 * GIB, "cuda:0": 8 * GIB}
DEFAULTS = {"cpu": 9 * GIB, "cuda:0": 7 * GIB}


@pytest.mark.parametrize(
    ("texts", "budgets"),
    [
        (None, None),
        ([], None),
        (["cuda:0=4GiB,cpu=8GiB"], {"cuda:0": "4GiB", "cpu": "8GiB"}),
        (["cuda:0 = 4GiB", "cpu"], {"cuda:0": "4GiB", "cpu": "auto"}),
    ],
)
def test_parse_memory(texts: list[str] | None, budgets: dict[str, str] | None) -> None:
    assert parse_memory(texts) == budgets


@pytest.mark.parametrize("text", ["=4GiB", "cpu=", "cpu=1GiB,cpu=2GiB", "cpu=1,5GiB"])
def test_unreadable_memory_is_refused(text: str) -> None:
    with pytest.raises(InvalidPlacement, match="--memory"):
        parse_memory([text])


@pytest.mark.parametrize(
    ("memory", "budgets"),
    [
        ({"cuda:0": "4GiB", "cpu": 8 * GIB}, {"cuda:0": 4 * GIB, "cpu": 8 * GIB}),
        ({"cpu": "auto"}, {"cpu": 9 * GIB}),  # what is not named is not used
        ({"cpu": "2GiB", "cpu:1": "1GiB", "cpu:2": "auto"}, {"cpu": 2 * GIB, "cpu:1": GIB, "cpu:2": 6 * GIB}),
        (
            {"cpu": "auto", "cpu:1": "auto", "cuda:0": "auto"},
            {"cpu": 9 * GIB // 2, "cpu:1": 9 * GIB // 2, "cuda:0": 7 * GIB},
        ),
        ({"cpu:1": "1GiB"}, {"cpu:1": GIB}),
    ],
)
def test_named_budgets(memory: dict[str, str | int], budgets: dict[str, int]) -> None:
    assert named_budgets(memory, TOTALS, DEFAULTS) == budgets


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"cuda:1": "1GiB"}, "there is no device 'cuda:1' here; there is cpu, cuda:0"),
        ({"gpu": "1GiB"}, "there is no device 'gpu'"),
        ({"cpu:0": "1GiB"}, "there is no device 'cpu:0'"),
        ({"cuda:0": "9GiB"}, "cuda:0 has 8.00 GiB of memory, not 9GiB"),
        ({"cpu:1": "17GiB"}, "cpu:1 has 16.0 GiB"),
        ({"cpu": "lots"}, "budget of cpu: 'lots' is not a size"),
        ({"cpu": -1}, "budget of cpu: -1 is out of range"),
        ({"cpu": "0"}, "a budget of 0 for cpu"),
        ({"cpu": "4"}, "budget of cpu: 4 is 4 B, too little for anything; write it with a unit, like 4GiB"),
        ({"CPU": "4GiB"}, "there is no device 'CPU' here; did you mean cpu?"),
        ({"CPU:1": "4GiB"}, "did you mean cpu:1?"),
        ({"cpu": "9GiB", "cpu:1": "auto"}, "--memory leaves nothing for cpu:1: plans may use 9.00 GiB there"),
        ({}, "memory names no device"),
        ({"cuda:0": 9 * GIB}, "cuda:0 has 8.00 GiB of memory, not 9.00 GiB"),
    ],
)
def test_impossible_budgets_are_refused(memory: dict[str, str | int], message: str) -> None:
    with pytest.raises(InvalidPlacement, match=message):
        named_budgets(memory, TOTALS, DEFAULTS)


@pytest.mark.parametrize(
    ("free", "host", "budget"),
    [
        (20 * GIB, True, 18 * GIB),
        (2 * GIB, True, 2 * GIB - 512 * MIB),
        (600 * MIB, True, 300 * MIB),  # the margin never takes more than half
        (20 * GIB, False, 19 * GIB),
        (2 * GIB, False, 2 * GIB - 256 * MIB),
        (0, False, 0),
    ],
)
def test_default_budget(free: int, host: bool, budget: int) -> None:
    assert default_budget_bytes(free, host) == budget
