"""Splits over more devices than the exact search takes: the best in a few orders, and how far off it is at most.

In a given order a plan takes some of the devices one after the other, so a dynamic program over layers finds the best
one. Orders put fast devices first or last, identical ones side by side; a device with the embedding comes first, one
with the head last. The bound lets every layer run where it is quickest, as far as budgets go, with nothing for hops: no
plan can be faster. Knows numbers only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy

from splitrun.planner.problem import INFINITE, Ends, Floats, Tables, excess_of
from splitrun.planner.search import Chain, Outcome, Price, seconds_within, with_formats


def fastest_of_many(tables: Tables, bottleneck: bool) -> tuple[Outcome, float]:
    """The best split that was found (none where nothing fits), and seconds that no split can beat."""
    outcome, price = Outcome(), seconds_within(INFINITE)
    orders = _orders(tables)
    device = tuple(slot.device for slot in tables.slots)
    for embed, head in itertools.product(range(len(tables.slots)), repeat=2):
        if device[embed] == device[head] and embed != head:
            continue
        chain = _chain(tables, price, device, embed, head, bottleneck)
        for order, (first, last) in itertools.product(orders, _places(device[embed] == device[head])):
            value, runs = _best_in_order(chain, order, first, last)
            if value >= outcome.value:
                continue
            split = with_formats(chain, tables, price, tables.budget_bytes, runs)
            if not any(excess_of(tables, split)):
                outcome.value, outcome.split = value, split
    return outcome, least_possible(tables, bottleneck)


def least_possible(tables: Tables, bottleneck: bool) -> float:
    """Seconds (on the busiest device) that no split can beat."""
    layers = tables.layers
    speeds: dict[int, float] = {}
    room: dict[int, int] = {}
    for slot in tables.slots:
        for choice in slot.choices[False, False]:
            one = float(numpy.diagonal(choice.seconds, 1).min()) - choice.stage_s
            starts, stops = numpy.nonzero(
                (choice.bytes <= tables.budget_bytes[slot.device]) & (choice.seconds < INFINITE)
            )
            longest = int((stops - starts).max())
            speeds[slot.device] = min(one, speeds.get(slot.device, INFINITE))
            room[slot.device] = max(longest, room.get(slot.device, 0))
    if sum(room.values()) < layers:
        return INFINITE
    if bottleneck:
        return _least_bottleneck(speeds, room, layers)
    total, left = _least_end_s(tables, (True, False)) + _least_end_s(tables, (False, True)), layers
    for number in sorted((number for number in speeds if room[number]), key=speeds.__getitem__):
        taken = min(left, room[number])
        total, left = total + taken * speeds[number], left - taken
    return total


def least_with_layers_on(tables: Tables, devices: Sequence[int], bottleneck: bool) -> float:
    """Seconds (on the busiest device) that no split beats whose layers are all on those devices, however large."""
    each = [
        numpy.diagonal(choice.seconds, 1) - choice.stage_s
        for slot in tables.slots
        for choice in (slot.choices[False, False] if slot.device in devices else ())
    ]
    if not each:
        return INFINITE
    layers_s = float(numpy.minimum.reduce(each).sum())
    if bottleneck:
        return layers_s / len(devices)
    return layers_s + _least_end_s(tables, (True, False)) + _least_end_s(tables, (False, True))


def _least_end_s(tables: Tables, ends: Ends) -> float:
    return min(choice.ends_s for slot in tables.slots for choice in slot.choices[ends])


def _least_bottleneck(speeds: dict[int, float], room: dict[int, int], layers: int) -> float:
    """The least seconds in which devices with that much room get through all layers side by side."""
    candidates = sorted({count * speeds[number] for number in speeds for count in range(1, room[number] + 1)})
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        within = candidates[middle] * (1 + 1e-12)
        done = sum(min(room[number], int(within / max(speeds[number], 1e-12))) for number in speeds)
        low, high = (low, middle) if done >= layers else (middle + 1, high)
    return candidates[low]


def _orders(tables: Tables) -> list[list[int]]:
    """As given, the quickest first, and the quickest last."""
    speed = dict.fromkeys(range(tables.devices), INFINITE)
    for slot in tables.slots:
        for choice in slot.choices[False, False]:
            speed[slot.device] = min(speed[slot.device], float(numpy.diagonal(choice.seconds, 1).min()))
    quickest = sorted(range(tables.devices), key=lambda number: (speed[number], number))
    found = [list(range(tables.devices)), quickest, quickest[::-1]]
    return [order for index, order in enumerate(found) if order not in found[:index]]


def _places(same: bool) -> Iterator[tuple[bool, bool]]:
    """Whether the device of the embedding has the first layers, and that of the head the last."""
    yield from ((False, False), (True, False), (False, True))
    if not same:
        yield True, True


def _chain(tables: Tables, price: Price, device: tuple[int, ...], embed: int, head: int, bottleneck: bool) -> Chain:
    """The problem with embed and head placed, every device alone with its memory."""
    charges = []
    for number, slot in enumerate(tables.slots):
        cap = int(tables.budget_bytes[slot.device])
        found = [price(choice, cap) for choice in slot.choices[number == embed, number == head]]
        charges.append(numpy.minimum.reduce(found))
    hop = numpy.zeros_like(tables.hop_s) if bottleneck else tables.hop_s
    start = hop[embed] + (0.0 if bottleneck else tables.enter_s[embed])
    end = hop[:, head] + (0.0 if bottleneck else tables.leave_s[head])
    return Chain(numpy.array(charges), device, hop, start, end, embed, head, bottleneck)


def _best_in_order(
    chain: Chain, order: Sequence[int], first: bool, last: bool
) -> tuple[float, tuple[tuple[int, int, int], ...]]:
    """The least value of the devices taken in that order, and its runs (slot, first layer, end)."""
    join = numpy.maximum if chain.bottleneck else numpy.add
    layers = chain.charge.shape[1] - 1
    ends = {chain.device[chain.embed], chain.device[chain.head]}
    middle = [number for number in order if number not in ends]
    slots = [slot for number in middle for slot in range(len(chain.device)) if chain.device[slot] == number]
    sequence = [chain.embed] * first + slots + [chain.head] * last
    reach: Floats = numpy.full((len(chain.device), layers + 1), INFINITE)
    came: dict[tuple[int, int], tuple[int, int]] = {}
    diagonal = numpy.arange(layers + 1)
    for slot in sequence:
        runs = chain.charge[slot].copy()
        runs[diagonal, diagonal] = INFINITE
        other = numpy.array([chain.device[each] != chain.device[slot] for each in range(len(chain.device))])
        arriving = numpy.where(other[:, None], reach + chain.hop[:, slot, None], INFINITE)
        arrive, before = arriving.min(axis=0), arriving.argmin(axis=0)
        if not first or slot == chain.embed:
            arrive[0], before[0] = chain.start[slot], -1
        total = join(arrive[:, None], runs)
        reach[slot], starts = total.min(axis=0), total.argmin(axis=0)
        came |= {(slot, stop): (int(before[start]), int(start)) for stop, start in enumerate(starts)}
    final = reach[:, layers] + chain.end
    if last:
        final = numpy.where(numpy.arange(len(final)) == chain.head, final, INFINITE)
    value, slot = float(final.min()), int(final.argmin())
    without_layers = {chain.embed, chain.head} - ({chain.embed} if first else set()) - ({chain.head} if last else set())
    for end in without_layers:
        alone = float(chain.charge[end, 0, 0])
        value = max(value, alone) if chain.bottleneck else value + alone
    found: list[tuple[int, int, int]] = []
    stop = layers
    while value < INFINITE and slot >= 0:
        before_slot, start = came[slot, stop]
        found.append((slot, start, stop))
        slot, stop = before_slot, start
    return value, tuple(reversed(found))
