"""From facts to the numbers the search works on: what devices can hold (``choices.py``), hops and budgets.

Counts with the functions of ``cost.py`` and ``memory.py``, so that a plan's estimate and the search cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy

from splitrun.planner.choices import EVERY_ENDS, Parts, choices_of
from splitrun.planner.cost import ENGINE_DEVICE, activation_bytes, engine_hop_s, hop_s, objective_rows
from splitrun.planner.facts import FORMATS, Cluster, Device, ModelProfile, Workload
from splitrun.planner.memory import pool_budgets
from splitrun.planner.problem import Slot, Tables


def build_tables(
    profile: ModelProfile,
    cluster: Cluster,
    formats: Mapping[str, Sequence[str]],
    workload: Workload,
    apart: bool = False,
) -> Tables:
    """The search problem for the devices that ``formats`` names, each in any of its formats; ``apart``: embedding,
    layers and head of each in any."""
    devices = [device for device in cluster.devices if formats.get(device.name)]
    slots: list[Slot] = []
    sizes: list[int] = []
    for number, device in enumerate(devices):
        parts: dict[int, list[Parts]] = {}
        for weights in sorted(formats[device.name], key=FORMATS.index):
            size = activation_bytes(profile, device, weights)
            parts.setdefault(size, []).append(Parts.of(profile, device, workload, weights))
        for size, found in parts.items():
            slots.append(Slot(number, {ends: choices_of(device, found, ends, apart) for ends in EVERY_ENDS}))
            sizes.append(size)
    prefill, rows = workload.objective == "first-token", objective_rows(workload)
    names = [devices[slot.device].name for slot in slots]

    def hops(source: str, targets: Sequence[str], size: int) -> list[float]:
        return [hop_s(cluster, source, target, size, workload, prefill, rows) for target in targets]

    return Tables(
        slots=tuple(slots),
        hop_s=numpy.array([hops(name, names, size) for name, size in zip(names, sizes, strict=True)]),
        enter_s=numpy.array([engine_hop_s(cluster, name, workload, prefill, rows) for name in names]),
        leave_s=numpy.array([engine_hop_s(cluster, name, workload, prefill, rows) for name in names]),
        budget_bytes=numpy.array([device.budget_bytes for device in devices], dtype=numpy.int64),
        pools=shared_pools(cluster, devices),
        once_bytes=numpy.array([device.process_bytes for device in devices], dtype=numpy.int64),
        host=next((number for number, device in enumerate(devices) if device.name == ENGINE_DEVICE), None),
    )


def shared_pools(cluster: Cluster, devices: Sequence[Device]) -> tuple[tuple[tuple[int, ...], int], ...]:
    """(numbers of the devices, bytes) for each memory that more than one of the devices draws on."""
    members: dict[str, list[int]] = {}
    for number, device in enumerate(devices):
        members.setdefault(device.memory_pool, []).append(number)
    budgets = pool_budgets(cluster)
    return tuple((tuple(numbers), budgets[pool]) for pool, numbers in members.items() if len(numbers) > 1)
