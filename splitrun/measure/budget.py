"""Budgets: what ``--memory`` asks for, and what a device gives when nobody asks. Pure arithmetic and text.

``cuda:0=4GiB,cpu=8GiB`` names the devices to use and their budgets; a name without a size takes the default there. A
device that is not named is not used; without ``--memory`` every device is used. ``cpu:1``, ``cpu:2``, … are further
workers on the same processors, each with a budget of its own: those without a size share what the others leave of the
default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from splitrun.errors import InvalidPlacement
from splitrun.quantities import format_bytes, parse_budget

AUTOMATIC = "auto"
VIRTUAL_CPU = re.compile(r"cpu:[1-9]\d{0,2}")
HOST_MARGIN = (10, 512 << 20)
"""One part in 10 of what is free, at least 512 MiB, stays with the rest of the system: it shares this memory."""
DEVICE_MARGIN = (20, 256 << 20)
"""One part in 20, at least 256 MiB: fragmentation, and the screen where one is attached."""


def parse_memory(texts: Sequence[str] | None) -> dict[str, str | int] | None:
    """The budgets that the command line names, None when it names none; raises InvalidPlacement."""
    parts = [part.strip() for text in texts or () for part in text.split(",") if part.strip()]
    if not parts and texts:
        raise InvalidPlacement("--memory is empty: write it like cuda:0=4GiB,cpu=8GiB, or leave it out")
    if not parts:
        return None
    budgets: dict[str, str | int] = {}
    for part in parts:
        name, separator, size = (piece.strip() for piece in part.partition("="))
        if not separator and part[0].isdecimal():
            raise InvalidPlacement(
                f"--memory: {part!r} names no device: write it like cpu={part}; a fraction has a point, 1.5GiB"
            )
        if not name or (separator and not size):
            raise InvalidPlacement(f"--memory: {part!r} is not DEVICE=SIZE; write it like cuda:0=4GiB,cpu=8GiB")
        if name in budgets:
            raise InvalidPlacement(f"--memory: {name} is named twice; give each device one budget")
        budgets[name] = size or AUTOMATIC
    return budgets


def default_budget_bytes(free_bytes: int, host: bool) -> int:
    """What a plan may use of ``free_bytes``: all but the margin, and never less than half of what is free."""
    parts, least = HOST_MARGIN if host else DEVICE_MARGIN
    return max(free_bytes // 2, free_bytes - max(free_bytes // parts, least))


def named_budgets(
    memory: Mapping[str, str | int], totals: Mapping[str, int], defaults: Mapping[str, int]
) -> dict[str, int]:
    """Device -> budget in bytes for the devices that ``memory`` names.

    ``totals`` and ``defaults`` are total bytes and default budget of every device of this machine. Raises
    InvalidPlacement for an unknown device, an unreadable size, and a budget beyond the device's memory.
    """
    if not memory:
        raise InvalidPlacement("memory names no device; leave it out to use every device")
    sizes: dict[str, int] = {}
    for name, size in memory.items():
        if _known(name) not in totals:
            lower = name.lower()
            near = f"did you mean {lower}?" if _known(lower) in totals else f"there is {', '.join(totals)}"
            raise InvalidPlacement(f"there is no device {name!r} here; {near} (splitrun doctor)")
        if size != AUTOMATIC:
            sizes[name] = _size(name, size)
    budgets = {name: sizes[name] if name in sizes else _left(name, memory, sizes, defaults) for name in memory}
    for name, budget in budgets.items():
        total = totals[_known(name)]
        if budget > total:
            asked = memory[name] if isinstance(memory[name], str) else format_bytes(budget)
            raise InvalidPlacement(
                f"{name} has {format_bytes(total)} of memory, not {asked}; lower its budget in --memory"
            )
        if budget == 0:
            raise InvalidPlacement(f"a budget of 0 for {name}: leave the device out to keep it unused")
    return budgets


def _left(name: str, memory: Mapping[str, str | int], sizes: Mapping[str, int], defaults: Mapping[str, int]) -> int:
    """What a device without a size gets: an equal share of what those with sizes leave of the same memory's default."""
    known = _known(name)
    beside = [other for other in memory if _known(other) == known]
    left = defaults[known] - sum(sizes.get(other, 0) for other in beside)
    if left <= 0 and len(beside) > 1:
        raise InvalidPlacement(
            f"--memory leaves nothing for {name}: plans may use {format_bytes(defaults[known])} there, and others have "
            "that much; lower theirs, or give it a size of its own"
        )
    return max(left, 0) // sum(other not in sizes for other in beside)


def _known(name: str) -> str:
    """The device of this machine behind a name."""
    return "cpu" if VIRTUAL_CPU.fullmatch(name) else name


def _size(name: str, size: str | int) -> int:
    try:
        return parse_budget(size)
    except ValueError as error:
        raise InvalidPlacement(f"budget of {name}: {error}") from error
