"""Devices that are alike: whatever one does in a plan another could do as well, so one order of them stands for all.

Of devices that are alike a search need only look at plans that take the first of them before the second, and so on.
Knows numbers only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy

from splitrun.planner.problem import Choice, Slot, Tables

Classes = tuple[tuple[int, ...], ...]
DeviceSet = tuple[int, frozenset[int]]
"""Devices as a bit mask, and those of them that may come last in a chain."""
MAX_SUBSETS = 1 << 8
"""What the exact search goes through: every subset of eight different devices, or as many of devices some of which are
alike."""


def classes_of(tables: Tables) -> Classes:
    """The devices, those that are alike together, each class ascending. Who shares a memory with others is alone."""
    shared = {member for members, _ in tables.pools for member in members}
    held: dict[int, list[int]] = {}
    for index, slot in enumerate(tables.slots):
        held.setdefault(slot.device, []).append(index)
    found: list[list[int]] = []
    for device in sorted(held):
        for members in found:
            first = members[0]
            if not {first, device} & shared and _alike(tables, held[first], held[device]):
                members.append(device)
                break
        else:
            found.append([device])
    return tuple(map(tuple, found))


def subsets(classes: Classes) -> int:
    """How many sets of devices differ in more than the names of devices that are alike."""
    total = 1
    for members in classes:
        total *= len(members) + 1
    return total


def apart(classes: Classes, devices: set[int]) -> Classes:
    """The classes with those devices each in one of its own: they have a part that the others of their class lack."""
    rest = (tuple(each for each in members if each not in devices) for members in classes)
    return (*(members for members in rest if members), *((device,) for device in sorted(devices)))


def sets_of(classes: Classes) -> list[DeviceSet]:
    """The sets of devices to look at, smaller ones before those that contain them: of devices that are alike the first
    ones are taken, and in a chain they follow each other in that order."""
    found: list[DeviceSet] = []
    for counts in itertools.product(*(range(len(members) + 1) for members in classes)):
        taken = [members[:count] for members, count in zip(classes, counts, strict=True) if count]
        mask = sum(1 << device for members in taken for device in members)
        found.append((mask, frozenset(members[-1] for members in taken)))
    return sorted(found, key=lambda each: each[0])[1:]


def ends_of(classes: Classes) -> set[tuple[int, int]]:
    """Who may hold the embedding and who the head: of devices that are alike the first, or the first two."""
    firsts = {members[0] for members in classes}
    pairs = {(embed, head) for embed in firsts for head in firsts}
    return pairs | {(members[0], members[1]) for members in classes if len(members) > 1}


def _alike(tables: Tables, first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two devices, each given by its slots, could change places in every plan."""
    one, other = tables.slots[first[0]].device, tables.slots[second[0]].device
    if tables.budget_bytes[one] != tables.budget_bytes[other] or len(first) != len(second):
        return False
    order = numpy.arange(len(tables.slots))
    order[list(first)], order[list(second)] = list(second), list(first)
    if not numpy.array_equal(tables.hop_s[numpy.ix_(order, order)], tables.hop_s):
        return False
    if not all(numpy.array_equal(seconds[order], seconds) for seconds in (tables.enter_s, tables.leave_s)):
        return False
    return all(_same(tables.slots[a], tables.slots[b]) for a, b in zip(first, second, strict=True))


def _same(one: Slot, other: Slot) -> bool:
    return all(len(found) == len(other.choices[ends]) for ends, found in one.choices.items()) and all(
        _same_choice(mine, its)
        for ends, found in one.choices.items()
        for mine, its in zip(found, other.choices[ends], strict=True)
    )


def _same_choice(one: Choice, other: Choice) -> bool:
    figures = [(each.formats, each.stage_s, each.ends_s) for each in (one, other)]
    return (
        figures[0] == figures[1]
        and numpy.array_equal(one.seconds, other.seconds)
        and numpy.array_equal(one.bytes, other.bytes)
    )
