"""Exact search for the best contiguous split: dynamic programming over ranges of layers, device order and subsets.

A plan here is: a device for ``embed``, a device for ``head``, and a chain of distinct devices that share the layers,
one run each. Devices of embed and head are enumerated; then bytes of a device are known exactly as soon as its run
closes, so budgets are checked without rounding. Devices that share one memory are tried under every way to divide
it: the caps of all but one member run through the byte counts that its runs can have.

Exponential in devices (at most ``MAX_DEVICES``), polynomial in layers. Knows numbers only: no formats, no messages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy
import numpy.typing

Floats = numpy.typing.NDArray[numpy.float64]
Integers = numpy.typing.NDArray[numpy.int64]

MAX_DEVICES = 8
INFINITE = float("inf")


@dataclass(frozen=True)
class Tables:
    """What every possible run costs. d devices, n layers; entry [i, j] is the run of layers i to j - 1.

    layer_s       shape (d, n + 1, n + 1): seconds of a run; infinite where j <= i
    embed_s       shape (d,), and head_s likewise
    run_bytes     (holds embed, holds head) -> shape (d, n + 1, n + 1): all bytes of the device, the diagonal being
                  the device without layers; 0 on the diagonal of a device that holds nothing
    hop_s         shape (d, d): seconds from a device to the next
    enter_s       shape (d,): seconds from the engine to the device of embed; leave_s from that of head to the engine
    budget_bytes  shape (d,)
    pools         (members, bytes they may take together) for each memory that several devices share
    """

    layer_s: Floats
    embed_s: Floats
    head_s: Floats
    run_bytes: Mapping[tuple[bool, bool], Integers]
    hop_s: Floats
    enter_s: Floats
    leave_s: Floats
    budget_bytes: Integers
    pools: tuple[tuple[tuple[int, ...], int], ...] = ()

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.budget_bytes)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.layer_s.shape[1]) - 1


@dataclass(frozen=True)
class Split:
    """A plan by number: who holds embed and head, and the chain of (device, first layer, end)."""

    embed: int
    head: int
    runs: tuple[tuple[int, int, int], ...]


@dataclass
class Outcome:
    """The best split and its value, and the best value for each set of devices in use (as a bit mask)."""

    value: float = INFINITE
    split: Split | None = None
    by_devices: dict[int, float] = field(default_factory=dict)

    def best_with(self, device: int) -> float:
        """The best value among the plans that use that device; infinite when none fits."""
        return min((value for mask, value in self.by_devices.items() if mask >> device & 1), default=INFINITE)


@dataclass(frozen=True)
class Chain:
    """One problem for the dynamic program, embed and head already placed.

    ``charge`` has shape (d, n + 1, n + 1): what a run costs, infinite where it is not allowed; on the diagonal, what
    the device costs without layers (0 when it holds nothing). Charges add up, or with ``bottleneck`` the largest
    counts. ``start`` and ``end`` are the hops from embed to the first device of the chain and from the last to head.
    """

    charge: Floats
    hop: Floats
    start: Floats
    end: Floats
    embed: int
    head: int
    bottleneck: bool


def fastest(tables: Tables, bottleneck: bool) -> Outcome:
    """The split of least seconds under the budgets; with ``bottleneck``, of least seconds on its busiest device.

    Among splits with the same busiest device the one with the fewest seconds in all is taken.
    """
    outcome = _enumerate(tables, bottleneck, INFINITE)
    if not bottleneck or outcome.split is None:
        return outcome
    second = _enumerate(tables, False, outcome.value * (1 + 1e-12))
    return Outcome(outcome.value, second.split, outcome.by_devices)


def least_excess(tables: Tables) -> Outcome:
    """The split whose bytes beyond the budgets are fewest in all; value 0 when something fits."""
    outcome = Outcome()
    still = numpy.zeros((tables.devices, tables.devices))
    for embed, head in itertools.product(range(tables.devices), repeat=2):
        sizes = _sizes(tables, embed, head)
        for caps in _divisions(tables, sizes):
            beyond = numpy.maximum(sizes - caps[:, None, None], 0).astype(numpy.float64)
            charge = numpy.where(numpy.isinf(tables.layer_s) & ~_diagonal(tables), INFINITE, beyond)
            _solve_chain(Chain(charge, still, still[embed], still[:, head], embed, head, False), outcome)
            if outcome.value == 0:
                return outcome
    return outcome


def _enumerate(tables: Tables, bottleneck: bool, ceiling: float) -> Outcome:
    """Try every holder of embed and head and every division of shared memories; runs above ``ceiling`` are left out."""
    outcome = Outcome()
    still = numpy.zeros((tables.devices, tables.devices))
    for embed, head in itertools.product(range(tables.devices), repeat=2):
        sizes = _sizes(tables, embed, head)
        seconds = numpy.where(_diagonal(tables), 0.0, tables.layer_s)
        seconds[embed] += tables.embed_s[embed]
        seconds[head] += tables.head_s[head]
        if bottleneck:
            hop, start, end = still, still[embed], still[:, head]
        else:
            hop, start = tables.hop_s, tables.enter_s[embed] + tables.hop_s[embed]
            end = tables.hop_s[:, head] + tables.leave_s[head]
        for caps in _divisions(tables, sizes):
            allowed = (sizes <= caps[:, None, None]) & (seconds <= ceiling)
            charge = numpy.where(allowed, seconds, INFINITE)
            _solve_chain(Chain(charge, hop, start, end, embed, head, bottleneck), outcome)
    return outcome


def _sizes(tables: Tables, embed: int, head: int) -> Integers:
    """Bytes of every run on every device, given who holds embed and head. Shape: (d, n + 1, n + 1)."""
    sizes = tables.run_bytes[False, False].copy()
    for device in {embed, head}:
        sizes[device] = tables.run_bytes[device == embed, device == head][device]
    return sizes


def _diagonal(tables: Tables) -> numpy.typing.NDArray[numpy.bool_]:
    return numpy.eye(tables.layers + 1, dtype=numpy.bool_)[None]


def _divisions(tables: Tables, sizes: Integers) -> Iterator[Integers]:
    """Caps per device that respect its budget and, together, the memories it shares. Shape of each: (d,)."""
    runs = numpy.triu(numpy.ones(sizes.shape[1:], dtype=numpy.bool_))
    choices: list[list[tuple[tuple[int, int], ...]]] = []
    for members, together in tables.pools:
        levels = []
        for member in members[:-1]:
            most = min(int(tables.budget_bytes[member]), together)
            found = numpy.unique(sizes[member][runs])
            levels.append(sorted({0, most, *found[found < most].tolist()}))
        division = []
        for caps in itertools.product(*levels):
            rest = together - sum(caps)
            if rest >= 0:
                last = min(rest, int(tables.budget_bytes[members[-1]]))
                division.append(tuple(zip(members, (*caps, last), strict=True)))
        choices.append(division)
    for combination in itertools.product(*choices):
        caps_of = tables.budget_bytes.copy()
        for member, cap in itertools.chain.from_iterable(combination):
            caps_of[member] = cap
        yield caps_of


def _solve_chain(chain: Chain, outcome: Outcome) -> None:
    """Improve ``outcome`` with the best chain of every subset of devices."""
    devices, last_layer = chain.charge.shape[0], chain.charge.shape[1] - 1
    alone = chain.charge[numpy.arange(devices), 0, 0]
    runs = chain.charge.copy()
    runs[:, numpy.arange(last_layer + 1), numpy.arange(last_layer + 1)] = INFINITE
    join = numpy.maximum if chain.bottleneck else numpy.add
    # reach[mask][d, j]: least charge for layers 0 .. j - 1 by the devices of mask, d the last of them
    reach = numpy.full((1 << devices, devices, last_layer + 1), INFINITE)
    for mask in range(1, 1 << devices):
        for device in (device for device in range(devices) if mask >> device & 1):
            before = mask ^ (1 << device)
            if before == 0:
                reach[mask, device] = chain.start[device] + runs[device, 0]
                continue
            arrive = (reach[before] + chain.hop[:, device, None]).min(axis=0)
            if not numpy.isinf(arrive).all():
                reach[mask, device] = join(arrive[:, None], runs[device]).min(axis=0)
        outside = [device for device in {chain.embed, chain.head} if not mask >> device & 1]
        ends = reach[mask, :, last_layer] + chain.end
        for device in outside:
            ends = join(ends, alone[device])
        used, value = mask | 1 << chain.embed | 1 << chain.head, float(ends.min())
        if value < outcome.by_devices.get(used, INFINITE):
            outcome.by_devices[used] = value
        if value < outcome.value:
            outcome.value = value
            outcome.split = Split(chain.embed, chain.head, _trace(chain, runs, reach, mask, int(ends.argmin())))


def _trace(chain: Chain, runs: Floats, reach: Floats, mask: int, last: int) -> tuple[tuple[int, int, int], ...]:
    """The runs behind reach[mask][last, n], in order."""
    join = numpy.maximum if chain.bottleneck else numpy.add
    found: list[tuple[int, int, int]] = []
    stop = reach.shape[2] - 1
    while True:
        mask ^= 1 << last
        if mask == 0:
            return ((last, 0, stop), *reversed(found))
        arrive = reach[mask] + chain.hop[:, last, None]
        first = int(join(arrive.min(axis=0), runs[last, :, stop]).argmin())
        found.append((last, first, stop))
        last, stop = int(arrive[:, first].argmin()), first


def excess_of(tables: Tables, split: Split) -> list[int]:
    """Bytes beyond its budget (and the rest of a shared memory) for each device of that split."""
    sizes = _sizes(tables, split.embed, split.head)
    held = [0] * tables.devices
    for device in {split.embed, split.head}:
        held[device] = int(sizes[device, 0, 0])
    for device, start, stop in split.runs:
        held[device] = int(sizes[device, start, stop])
    beyond = [max(0, size - int(budget)) for size, budget in zip(held, tables.budget_bytes, strict=True)]
    for members, together in tables.pools:
        missing = sum(held[member] - beyond[member] for member in members) - together
        for member in reversed(members):
            more = min(max(missing, 0), held[member] - beyond[member])
            beyond[member] += more
            missing -= more
    return beyond


def used_devices(split: Split) -> Sequence[int]:
    """The devices of the split, ascending."""
    return sorted({split.embed, split.head, *(device for device, _, _ in split.runs)})
