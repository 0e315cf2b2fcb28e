"""The search problem in numbers: what every run of layers costs on every device in every format; and its answers.

Knows no algorithm, no formats' names, no messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
import numpy.typing

Floats = numpy.typing.NDArray[numpy.float64]
Integers = numpy.typing.NDArray[numpy.int64]
Bounds = tuple[int, int]
INFINITE = float("inf")


@dataclass(frozen=True)
class Choice:
    """One device with one weight format; n layers. Entry [i, j] is the run of layers i to j - 1.

    number     of the format, the most precise first
    layer_s    shape (n + 1, n + 1): seconds of a run as one stage; infinite where j <= i
    stage_s    what a further stage on the device takes beside its units
    embed_s, head_s  seconds of the two ends
    run_bytes  (holds embed, holds head) -> shape (n + 1, n + 1): all bytes of the device, the diagonal being the
               device without layers; 0 on the diagonal of a device that holds nothing
    """

    number: int
    layer_s: Floats
    stage_s: float
    embed_s: float
    head_s: float
    run_bytes: Mapping[tuple[bool, bool], Integers]

    def seconds(self, embed: bool, head: bool) -> Floats:
        """Seconds of all the device's stages for each run; an end beside the run joins its stage."""
        last = self.layer_s.shape[0] - 1
        total = self.layer_s.copy()
        total[numpy.arange(last + 1), numpy.arange(last + 1)] = 0.0
        if embed:
            total += self.embed_s + self.stage_s
            total[0, 1:] -= self.stage_s
        if head:
            total += self.head_s + self.stage_s
            total[:last, last] -= self.stage_s
        return total


@dataclass(frozen=True)
class Slot:
    """The choices of one device that hand on activations of one size: between them only seconds and bytes decide."""

    device: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Tables:
    """The search problem for some slots and the devices behind them.

    hop_s         shape (slots, slots): seconds from a slot to the next
    enter_s       shape (slots,): seconds from the engine to the slot of embed; leave_s from that of head to the engine
    budget_bytes  shape (devices,)
    pools         (members, bytes they may take together) for each memory that several devices share
    """

    slots: tuple[Slot, ...]
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
        return int(self.slots[0].choices[0].layer_s.shape[0]) - 1


@dataclass(frozen=True)
class Split:
    """A plan by number: who holds embed and head, the chain of (device, first layer, end), device -> format."""

    embed: int
    head: int
    runs: tuple[tuple[int, int, int], ...]
    formats: Mapping[int, int]


def held_bytes(tables: Tables, split: Split) -> list[int]:
    """Bytes of each device in that split."""
    bounds: dict[int, Bounds] = dict.fromkeys((split.embed, split.head), (0, 0))
    bounds |= {device: (start, stop) for device, start, stop in split.runs}
    held = [0] * tables.devices
    for device, run in bounds.items():
        choice = choice_of(tables, device, split.formats[device])
        held[device] = int(choice.run_bytes[device == split.embed, device == split.head][run])
    return held


def choice_of(tables: Tables, device: int, number: int) -> Choice:
    """That device in the format of that number."""
    slots = (slot for slot in tables.slots if slot.device == device)
    return next(choice for slot in slots for choice in slot.choices if choice.number == number)


def seconds_of(tables: Tables, split: Split) -> float:
    """Seconds of the split's stages and hops, all added up."""
    bounds: dict[int, Bounds] = dict.fromkeys((split.embed, split.head), (0, 0))
    bounds |= {device: (start, stop) for device, start, stop in split.runs}
    total = 0.0
    for device, run in bounds.items():
        choice = choice_of(tables, device, split.formats[device])
        total += float(choice.seconds(device == split.embed, device == split.head)[run])
    path = [_slot(tables, device, split) for device in (split.embed, *(run[0] for run in split.runs), split.head)]
    total += float(tables.enter_s[path[0]] + tables.leave_s[path[-1]])
    return total + sum(float(tables.hop_s[pair]) for pair in pairwise(path))


def _slot(tables: Tables, device: int, split: Split) -> int:
    """The number of the slot that the device has in that split."""
    for number, slot in enumerate(tables.slots):
        if slot.device == device and any(choice.number == split.formats[device] for choice in slot.choices):
            return number
    raise KeyError(device)


def excess_of(tables: Tables, split: Split) -> list[int]:
    """Bytes beyond its budget (and the rest of a shared memory) for each device of that split."""
    held = held_bytes(tables, split)
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
