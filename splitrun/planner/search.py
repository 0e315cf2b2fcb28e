"""Exact search for the best contiguous split: dynamic programming over ranges of layers, device order and subsets.

A plan here is: a device for ``embed``, a device for ``head``, a chain of distinct devices that share the layers, one
run each, and a weight format for embed, layers and head of each device (``choices.py``). Devices of embed and head are
enumerated; then bytes of a device are known exactly as soon as its run closes, so budgets are checked without rounding
and the quickest formats that fit are taken at once. Devices that share one memory are tried under every way to divide
it: the caps of all but one member run through the byte counts that its runs can have.

Exponential in devices that differ (``alike.py``: at most ``MAX_SUBSETS`` sets of them), polynomial in layers. Knows
numbers only: no formats' names, no messages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy

from splitrun.planner.alike import Classes, DeviceSet, apart, classes_of, ends_of, sets_of
from splitrun.planner.problem import INFINITE, Bounds, Choice, Floats, Integers, Split, Tables

Pair = tuple[int, int]
"""The slots of embed and head."""


@dataclass
class Outcome:
    """The best split and its value, and the best value for each set of devices in use (as a bit mask) and for the slots
    of embed and head."""

    value: float = INFINITE
    split: Split | None = None
    by_devices: dict[int, float] = field(default_factory=dict)
    by_ends: dict[Pair, float] = field(default_factory=dict)

    def best_with(self, device: int) -> float:
        """The best value among the plans that use that device; infinite when none fits."""
        return min((value for mask, value in self.by_devices.items() if mask >> device & 1), default=INFINITE)

    def best_without(self, device: int) -> float:
        """The best value among the plans that do without it."""
        return min((value for mask, value in self.by_devices.items() if not mask >> device & 1), default=INFINITE)


@dataclass(frozen=True)
class Chain:
    """One problem for the dynamic program, embed and head already placed; all arrays by slot.

    ``charge`` has shape (slots, n + 1, n + 1): what a run costs, infinite where it is not allowed; on the diagonal,
    what the device costs without layers (0 when it holds nothing). Charges add up, or with ``bottleneck`` the largest
    counts. ``start`` and ``end`` are the hops from embed to the first slot of the chain and from the last to head.
    """

    charge: Floats
    device: tuple[int, ...]
    hop: Floats
    start: Floats
    end: Floats
    embed: int
    head: int
    bottleneck: bool


@dataclass(frozen=True)
class Problem:
    """A chain under the caps of one division of shared memories, and the sets of devices that it may go through."""

    chain: Chain
    caps: Integers
    classes: Classes
    sets: Sequence[DeviceSet]


Reach = dict[int, tuple[Floats, Floats]]
"""Mask of devices -> two arrays of shape (slots, n + 1). Entry [s, j] of the first is the least charge for layers 0 to
j - 1 by all devices of the mask, slot s the last of them; of the second, the least with the hop to slot s."""
Price = Callable[[Choice, int], Floats]
"""What a choice costs per run: (choice, bytes it may take) -> shape (n + 1, n + 1)."""


def fastest(tables: Tables, bottleneck: bool, ends: Collection[int] | None = None) -> Outcome:
    """The split of least seconds under the budgets; with ``bottleneck``, of least seconds on its busiest device.

    Among splits with the same busiest device the one with the fewest seconds in all is taken. ``ends``: devices that
    may hold embed and head; None: every one.
    """
    holders = [number for number, slot in enumerate(tables.slots) if ends is None or slot.device in ends]
    pairs = {(embed, head) for embed in holders for head in holders}
    outcome = best_of(tables, seconds_within(INFINITE), bottleneck, not bottleneck, pairs)
    if not bottleneck or outcome.split is None:
        return outcome
    ceiling = outcome.value * (1 + 1e-12)
    pairs = {pair for pair, value in outcome.by_ends.items() if value <= ceiling}
    second = best_of(tables, seconds_within(ceiling), False, True, pairs)
    return replace(outcome, split=second.split)


def seconds_within(ceiling: float) -> Price:
    """Seconds of runs that keep the cap and take no longer than ``ceiling``."""

    def price(choice: Choice, cap: int) -> Floats:
        return numpy.where((choice.bytes <= cap) & (choice.seconds <= ceiling), choice.seconds, INFINITE)

    return price


def least_excess(tables: Tables) -> Outcome:
    """The split whose bytes beyond the budgets are fewest in all; value 0 when something fits."""
    return best_of(tables, excess, False, False)


def excess(choice: Choice, cap: int) -> Floats:
    """Bytes beyond the cap; infinite for what is no run."""
    beyond = numpy.maximum(choice.bytes - cap, 0).astype(numpy.float64)
    return numpy.where(numpy.isinf(choice.seconds), INFINITE, beyond)


def best_of(
    tables: Tables, price: Price, bottleneck: bool, with_hops: bool, allowed: Collection[Pair] | None = None
) -> Outcome:
    """The split of least cost: the sum over its devices, or with ``bottleneck`` the largest, and hops where they count.

    ``allowed``: slots that may hold embed and head; None: all.
    """
    outcome, embed = Outcome(), -1
    for problem in problems(tables, price, bottleneck, with_hops, allowed):
        if problem.chain.embed != embed or tables.pools:  # else devices without head go on from where they came to
            embed, shared = problem.chain.embed, Reach()
        _improve(problem, tables, price, outcome, shared)
    return outcome


def problems(
    tables: Tables, price: Price, bottleneck: bool, with_hops: bool, allowed: Collection[Pair] | None = None
) -> Iterator[Problem]:
    """One problem for every holder of embed and head, those of one embed in a row, and every division of shared
    memories."""
    classes = classes_of(tables)
    pairs = ends_of(classes)
    count = len(tables.slots)
    device = tuple(slot.device for slot in tables.slots)
    still = numpy.zeros((count, count))
    prices: dict[tuple[int, bool, bool, int], Floats] = {}

    def charge_of(slot: int, embed: bool, head: bool, cap: int) -> Floats:
        key = (slot, embed, head, cap)
        if key not in prices:
            each = [price(choice, cap) for choice in tables.slots[slot].choices[embed, head]]
            prices[key] = each[0] if len(each) == 1 else numpy.minimum.reduce(each)
        return prices[key]

    for embed, head in itertools.product(range(count), repeat=2):
        if allowed is not None and (embed, head) not in allowed:
            continue
        if (device[embed] == device[head] and embed != head) or (device[embed], device[head]) not in pairs:
            continue  # one size of activations per device, and of devices that are alike the first
        others = apart(classes, {device[embed], device[head]})
        sets = sets_of(others)
        hop, start, end = still, still[embed], still[:, head]
        if with_hops:
            hop, start = tables.hop_s, tables.enter_s[embed] + tables.hop_s[embed]
            end = tables.hop_s[:, head] + tables.leave_s[head]
        for caps in divisions(tables, device[embed], device[head]):
            charge = numpy.stack(
                [charge_of(slot, slot == embed, slot == head, int(caps[device[slot]])) for slot in range(count)]
            )
            for slot in range(count):  # the other slots of a device that holds an end
                if device[slot] in (device[embed], device[head]) and slot not in (embed, head):
                    charge[slot] = INFINITE
            yield Problem(Chain(charge, device, hop, start, end, embed, head, bottleneck), caps, others, sets)


def divisions(tables: Tables, embed: int, head: int) -> Iterator[Integers]:
    """Caps per device that respect its budget and, together, the memories it shares. Shape of each: (devices,)."""
    choices: list[list[tuple[tuple[int, int], ...]]] = []
    for members, together in tables.pools:
        levels = []
        for member in members[:-1]:
            most = min(int(tables.budget_bytes[member]), together)
            found = _sizes(tables, member, member == embed, member == head)
            levels.append(sorted({0, most, *found[found < most].tolist()}))
        division = []
        for caps in itertools.product(*levels):
            used = [member for member, cap in zip(members, caps, strict=False) if cap]
            if sum(caps) - tables.counted_twice(used) > together:
                continue
            rest = together - sum(caps) + tables.counted_twice((*used, members[-1]))
            last = max(0, min(rest, together, int(tables.budget_bytes[members[-1]])))
            division.append(tuple(zip(members, (*caps, last), strict=True)))
        choices.append(division)
    for combination in itertools.product(*choices):
        caps_of = tables.budget_bytes.copy()
        for member, cap in itertools.chain.from_iterable(combination):
            caps_of[member] = cap
        yield caps_of


def _sizes(tables: Tables, device: int, embed: bool, head: bool) -> Integers:
    """Every byte count that the device can have, in any format."""
    runs = numpy.triu(numpy.ones((tables.layers + 1,) * 2, dtype=numpy.bool_))
    slots = (slot for slot in tables.slots if slot.device == device)
    found = [choice.bytes[runs] for slot in slots for choice in slot.choices[embed, head]]
    return numpy.unique(numpy.concatenate(found)) if found else numpy.zeros(0, dtype=numpy.int64)


def _improve(problem: Problem, tables: Tables, price: Price, outcome: Outcome, shared: Reach) -> None:
    """Improve ``outcome`` with the best chain of every set of devices; ``shared`` as for ``reach_of``."""
    chain, caps = problem.chain, problem.caps
    runs, last_layer = runs_of(chain), chain.charge.shape[1] - 1
    alone = chain.charge[:, 0, 0]
    join = numpy.maximum if chain.bottleneck else numpy.add
    reach = reach_of(chain, runs, problem.sets, shared)
    ends_held = 1 << chain.device[chain.embed] | 1 << chain.device[chain.head]
    pair = (chain.embed, chain.head)
    for mask, (table, _) in reach.items():
        ends = table[:, last_layer] + chain.end
        for slot in {chain.embed, chain.head}:
            if not mask >> chain.device[slot] & 1:
                ends = join(ends, alone[slot])
        used, value = mask | ends_held, float(ends.min())
        if value < outcome.by_devices.get(used, INFINITE):
            outcome.by_devices[used] = value
        outcome.by_ends[pair] = min(value, outcome.by_ends.get(pair, INFINITE))
        if value < outcome.value:
            outcome.value = value
            found = _trace(chain, runs, reach, mask, int(ends.argmin()))
            outcome.split = with_formats(chain, tables, price, caps, found)


def runs_of(chain: Chain) -> Floats:
    """What runs of one layer and more cost; infinite where there is none. Shape: (slots, n + 1, n + 1)."""
    runs, layers = chain.charge.copy(), numpy.arange(chain.charge.shape[1])
    runs[:, layers, layers] = INFINITE
    return runs


def reach_of(chain: Chain, runs: Floats, sets: Sequence[DeviceSet], shared: Reach) -> Reach:
    """How far the devices of each set come. ``shared`` is what was found for another head with the same embed and caps,
    where devices without either head come as far; and is given what this one's finds."""
    count, size = runs.shape[:2]
    join = numpy.maximum if chain.bottleneck else numpy.add
    reach: Reach = {}
    room = numpy.empty((size, size))
    for mask, last in sets:
        with_head = mask >> chain.device[chain.head] & 1
        if not with_head and mask in shared:
            reach[mask] = shared[mask]
            continue
        table = numpy.full((count, size), INFINITE)
        for slot in (slot for slot in range(count) if chain.device[slot] in last):
            before = mask ^ (1 << chain.device[slot])
            if before == 0:
                table[slot] = chain.start[slot] + runs[slot, 0]
                continue
            arrive = reach[before][1][slot]
            first = int((arrive < INFINITE).argmax())
            if arrive[first] < INFINITE:
                joined = join(arrive[first:, None], runs[slot, first:, first:], out=room[first:, first:])
                joined.min(axis=0, out=table[slot, first:])
        reach[mask] = table, (table[:, None] + chain.hop[:, :, None]).min(axis=0)
        if not with_head:
            shared[mask] = reach[mask]
    return reach


def _trace(chain: Chain, runs: Floats, reach: Reach, mask: int, last: int) -> tuple[tuple[int, int, int], ...]:
    """The runs (slot, first layer, end) behind entry [last, n] of what the mask reaches, in order."""
    join = numpy.maximum if chain.bottleneck else numpy.add
    found: list[tuple[int, int, int]] = []
    stop = runs.shape[2] - 1
    while True:
        mask ^= 1 << chain.device[last]
        if mask == 0:
            return ((last, 0, stop), *reversed(found))
        arrive = reach[mask][0] + chain.hop[:, last, None]
        first = int(join(arrive.min(axis=0), runs[last, :, stop]).argmin())
        found.append((last, first, stop))
        last, stop = int(arrive[:, first].argmin()), first


def with_formats(
    chain: Chain, tables: Tables, price: Price, caps: Integers, found: Sequence[tuple[int, int, int]]
) -> Split:
    """The split of those runs, each device in the cheapest formats; of equals in the most precise."""
    bounds: dict[int, Bounds] = dict.fromkeys((chain.embed, chain.head), (0, 0))
    bounds |= {slot: (start, stop) for slot, start, stop in found}
    formats = {}
    for slot, (start, stop) in bounds.items():
        device, choices = chain.device[slot], tables.slots[slot].choices[slot == chain.embed, slot == chain.head]
        costs = [float(price(choice, int(caps[device]))[start, stop]) for choice in choices]
        formats[device] = choices[costs.index(min(costs))].formats
    runs = tuple((chain.device[slot], start, stop) for slot, start, stop in found)
    return Split(chain.device[chain.embed], chain.device[chain.head], runs, formats)
