"""What one device can hold, and in which weight formats: seconds and bytes of every run of layers, with either end.

Embedding, layers and head of a device may be in formats of their own where a plan asks for precision, as long as they
compute in types of one size; parts beside each other in one format are one stage, others a stage each. Counts with the
functions of ``cost.py`` and ``memory.py``. Knows no budgets and no other devices.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from splitrun.planner.cost import objective_rows, stage_overhead_s, unit_s
from splitrun.planner.facts import FORMATS, Device, ModelProfile, Workload
from splitrun.planner.memory import (
    ALLOCATOR_SHARE,
    MARGIN_SHARE,
    UnitMemory,
    allocator_bytes,
    device_memory,
    kv_dtype_on,
    margin_bytes,
    unit_memory,
)
from splitrun.planner.placement import KVSpec
from splitrun.planner.problem import INFINITE, Choice, Ends, Floats, Integers
from splitrun.planner.quality import unit_loss

EVERY_ENDS: tuple[Ends, ...] = ((False, False), (True, False), (False, True), (True, True))


@dataclass(frozen=True)
class Parts:
    """One device with one format; n layers.

    number      of the format
    seconds     (embed, head)
    losses      (embed, head) in precision
    stage_s     what a stage takes beside its units
    bills       (embed, head)
    tied_bytes  that embed and head share in this format
    run_s       shape (n + 1, n + 1): the layers i to j - 1 as one stage; 0 without layers, infinite where j < i
    held_bytes  the same, weights, KV and states; what there is where j < i does not matter
    workspace_bytes  the same, the largest of any of the layers
    """

    number: int
    seconds: tuple[float, float]
    losses: tuple[float, float]
    stage_s: float
    bills: tuple[UnitMemory, UnitMemory]
    tied_bytes: int
    run_s: Floats
    held_bytes: Integers
    workspace_bytes: Integers

    @classmethod
    def of(cls, profile: ModelProfile, device: Device, workload: Workload, weights: str) -> Parts:
        """As that device has them in that format."""
        dtype, last = kv_dtype_on(device, weights), profile.layers + 1
        kinds = _kinds(profile, device, weights)
        counted = {unit: unit_s(profile, unit, device, weights, workload, dtype) for unit in set(kinds)}
        seconds = [counted[kind] for kind in kinds]
        prefill, rows = workload.objective == "first-token", objective_rows(workload)
        stage_s = stage_overhead_s(profile, device, weights, workload, prefill, rows)
        ahead = numpy.concatenate([[0.0], numpy.cumsum(seconds[1:-1])])
        able = numpy.tri(last, dtype=numpy.bool_).T & device.holds_layers
        run_s = numpy.where(able, stage_s + ahead[None, :] - ahead[:, None], INFINITE)
        numpy.fill_diagonal(run_s, 0.0)
        spec = KVSpec(dtype=dtype)
        billed = {unit: unit_memory(profile, unit, device, weights, workload, spec) for unit in set(kinds)}
        bills = [billed[kind] for kind in kinds]
        sizes = [bill.weight_bytes + bill.kv_bytes + bill.state_bytes for bill in bills[1:-1]]
        before = numpy.concatenate([[0], numpy.cumsum(numpy.array(sizes, dtype=numpy.int64))])
        return cls(
            number=FORMATS.index(weights),
            seconds=(seconds[0], seconds[last]),
            losses=(unit_loss(profile, 0, weights), unit_loss(profile, last, weights)),
            stage_s=stage_s,
            bills=(bills[0], bills[last]),
            tied_bytes=profile.tied_bytes.get(weights, 0),
            run_s=run_s,
            held_bytes=before[None, :] - before[:, None],
            workspace_bytes=_largest([bill.workspace_bytes for bill in bills[1:-1]]),
        )


def choices_of(device: Device, parts: Sequence[Parts], ends: Ends, apart: bool) -> tuple[Choice, ...]:
    """The device holding those ends, in any of the formats, the most precise first; ``apart``: each part in any.

    Ends that others beat, with the same layers, in seconds, bytes and precision are left out.
    """
    found = []
    for layers in parts:
        sides = [(parts if apart else [layers]) if held else [None] for held in ends]
        every = [(embed, head) for embed, head in itertools.product(*sides)]
        figures = [_figures(embed, layers, head) for embed, head in every]
        for index, (embed, head) in enumerate(every):
            rivals = (other for number, other in enumerate(figures) if number != index)
            if not any(_beats(other, figures[index]) for other in rivals) and figures[index] not in figures[:index]:
                found.append(_choice(device, embed, layers, head))
    return tuple(found)


def _kinds(profile: ModelProfile, device: Device, weights: str) -> list[int]:
    """Unit -> the first that takes the same seconds and bytes on that device in that format: each is counted once."""
    place = (device.name, weights)
    measured, peaks = profile.seconds.get(place), profile.peaks.get(place)
    return [
        kind
        if (measured is None or measured.units[unit] == measured.units[kind])
        and (peaks is None or peaks[unit] == peaks[kind])
        else unit
        for unit, kind in enumerate(profile.kinds)
    ]


def _figures(embed: Parts | None, layers: Parts, head: Parts | None) -> tuple[float, ...]:
    """What counts of ends beside such layers: seconds with no, the first, the last and all layers, bytes, losses."""
    held = [(part, side) for side, part in enumerate((embed, head)) if part is not None]
    apart_s = sum(part.seconds[side] + part.stage_s for part, side in held)
    joined_s = [part.stage_s if part is layers else 0.0 for part in (embed, head)]
    bills = [part.bills[side] for part, side in held]
    tied = embed.tied_bytes if embed is not None and embed is head else 0
    return (
        apart_s,
        apart_s - joined_s[0],
        apart_s - joined_s[1],
        apart_s - sum(joined_s),
        sum(bill.weight_bytes + bill.kv_bytes + bill.state_bytes for bill in bills) - tied,
        max((bill.workspace_bytes for bill in bills), default=0),
        sum(part.losses[side] for part, side in held),
    )


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(mine <= its for mine, its in zip(one, other, strict=True))


def _choice(device: Device, embed: Parts | None, layers: Parts, head: Parts | None) -> Choice:
    last = layers.run_s.shape[0] - 1
    seconds, ends_s = layers.run_s.copy(), 0.0
    beside = ((embed, 0, (0, slice(1, None))), (head, 1, (slice(0, last), last)))
    for part, side, edge in beside:
        if part is not None:
            ends_s += part.seconds[side]
            seconds += part.seconds[side] + part.stage_s
            if part is layers:
                seconds[edge] -= part.stage_s
    return Choice(
        ends=(embed is not None, head is not None),
        formats=((embed or layers).number, layers.number, (head or layers).number),
        seconds=seconds,
        bytes=_bytes(device, embed, layers, head),
        stage_s=layers.stage_s,
        ends_s=ends_s,
    )


def _bytes(device: Device, embed: Parts | None, layers: Parts, head: Parts | None) -> Integers:
    """All bytes of the device for each run of layers. Shape: (n + 1, n + 1)."""
    bills = [part.bills[side] for side, part in enumerate((embed, head)) if part is not None]
    base = device_memory(device, 0, bills, embed.tied_bytes if embed is not None and embed is head else 0)
    sizes = base.weight_bytes + base.kv_bytes + base.state_bytes + layers.held_bytes
    sizes += sizes // ALLOCATOR_SHARE + sizes // MARGIN_SHARE
    sizes += numpy.maximum(layers.workspace_bytes, base.workspace_bytes)
    sizes += device.context_bytes + device.layers_context_bytes + allocator_bytes(device, 0) + margin_bytes(device, 0)
    numpy.fill_diagonal(sizes, base.total_bytes if bills else 0)
    return sizes


def _largest(workspaces: Sequence[int]) -> Integers:
    """The largest of each run's. Shape: (n + 1, n + 1)."""
    each, count = numpy.array(workspaces, dtype=numpy.int64), len(workspaces)
    largest = numpy.zeros((count + 1, count + 1), dtype=numpy.int64)
    ahead = numpy.triu(numpy.broadcast_to(each, (count, count)))
    numpy.maximum.accumulate(ahead, axis=1, out=largest[:-1, 1:])
    return largest
