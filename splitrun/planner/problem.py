"""The search problem in numbers: what every run of layers costs on every device in every format; and its answers.

Knows no algorithm, no formats' names, no messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
import numpy.typing

Floats = numpy.typing.NDArray[numpy.float64]
Integers = numpy.typing.NDArray[numpy.int64]
Bounds = tuple[int, int]
INFINITE = float("inf")


Formats = tuple[int, int, int]
"""Numbers of the weight formats of embed, layers and head on one device, the most precise format being 0."""
Ends = tuple[bool, bool]
"""Whether a device holds embed, and whether it holds head."""


@dataclass(frozen=True)
class Choice:
    """One device that holds those ends, with a format for each of its parts; n layers.

    Entry [i, j] is the device with layers i to j - 1; the diagonal is the device without layers.

    formats  of a part that is not held: any
    seconds  shape (n + 1, n + 1): all stages of the device, which are one where parts are beside each other and of one
             format; infinite where j < i
    bytes    shape (n + 1, n + 1): all bytes of the device; 0 on the diagonal of a device that holds nothing
    stage_s  what the stage of the layers takes beside its units
    ends_s   what embed and head take, their stages' own seconds not included
    """

    ends: Ends
    formats: Formats
    seconds: Floats
    bytes: Integers
    stage_s: float
    ends_s: float


@dataclass(frozen=True)
class Slot:
    """The choices of one device that hand on activations of one size, for each of the ends that it may hold: between
    them only seconds and bytes decide."""

    device: int
    choices: Mapping[Ends, tuple[Choice, ...]]


@dataclass(frozen=True)
class Tables:
    """The search problem for some slots and the devices behind them.

    hop_s         shape (slots, slots): seconds from a slot to the next
    enter_s       shape (slots,): seconds from the engine to the slot of embed; leave_s from that of head to the engine
    budget_bytes  shape (devices,)
    pools         (members, bytes they may take together) for each memory that several devices share
    once_bytes    shape (devices,): what a device's bytes hold of the process, taken once where ``host`` is in use too
    host          the processor that pays for the process; None: there is none
    """

    slots: tuple[Slot, ...]
    hop_s: Floats
    enter_s: Floats
    leave_s: Floats
    budget_bytes: Integers
    pools: tuple[tuple[tuple[int, ...], int], ...] = ()
    once_bytes: Integers | None = None
    host: int | None = None

    def counted_twice(self, used: Iterable[int]) -> int:
        """Bytes of those devices, all in use, that they do not take beside each other."""
        used = tuple(used)
        if self.once_bytes is None or self.host not in used:
            return 0
        return sum(int(self.once_bytes[device]) for device in used)

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.budget_bytes)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.slots[0].choices[False, False][0].seconds.shape[0]) - 1


@dataclass(frozen=True)
class Split:
    """A plan by number: who holds embed and head, the chain of (device, first layer, end), device -> its formats."""

    embed: int
    head: int
    runs: tuple[tuple[int, int, int], ...]
    formats: Mapping[int, Formats]

    @property
    def bounds(self) -> dict[int, Bounds]:
        """Device -> (first layer, end); (0, 0) for a device that holds none."""
        return dict.fromkeys((self.embed, self.head), (0, 0)) | {each[0]: (each[1], each[2]) for each in self.runs}

    def ends(self, device: int) -> Ends:
        """Which ends the device holds."""
        return device == self.embed, device == self.head


def held_bytes(tables: Tables, split: Split) -> list[int]:
    """Bytes of each device in that split."""
    held = [0] * tables.devices
    for device, run in split.bounds.items():
        held[device] = int(choice_of(tables, split, device).bytes[run])
    return held


def choice_of(tables: Tables, split: Split, device: int) -> Choice:
    """How the split has that device."""
    return _slot_and_choice(tables, split, device)[1]


def busy_s(tables: Tables, split: Split) -> dict[int, float]:
    """Device -> seconds of all its stages."""
    return {device: float(choice_of(tables, split, device).seconds[run]) for device, run in split.bounds.items()}


def seconds_of(tables: Tables, split: Split) -> float:
    """Seconds of the split's stages and hops, all added up."""
    order = (split.embed, *(run[0] for run in split.runs), split.head)
    path = [_slot_and_choice(tables, split, device)[0] for device in order]
    hops = sum(float(tables.hop_s[pair]) for pair in pairwise(path))
    return sum(busy_s(tables, split).values()) + hops + float(tables.enter_s[path[0]] + tables.leave_s[path[-1]])


def _slot_and_choice(tables: Tables, split: Split, device: int) -> tuple[int, Choice]:
    for number, slot in enumerate(tables.slots):
        for choice in slot.choices[split.ends(device)] if slot.device == device else ():
            if choice.formats == split.formats[device]:
                return number, choice
    raise KeyError(device)


def excess_of(tables: Tables, split: Split) -> list[int]:
    """Bytes beyond its budget (and the rest of a shared memory) for each device of that split."""
    held = held_bytes(tables, split)
    beyond = [max(0, size - int(budget)) for size, budget in zip(held, tables.budget_bytes, strict=True)]
    for members, together in tables.pools:
        twice = tables.counted_twice(member for member in members if held[member])
        missing = sum(held[member] - beyond[member] for member in members) - twice - together
        for member in reversed(members):
            more = min(max(missing, 0), held[member] - beyond[member])
            beyond[member] += more
            missing -= more
    return beyond


def used_devices(split: Split) -> Sequence[int]:
    """The devices of the split, ascending."""
    return sorted({split.embed, split.head, *(device for device, _, _ in split.runs)})
