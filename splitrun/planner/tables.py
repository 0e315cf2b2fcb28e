"""From facts to the numbers the search works on: seconds and bytes of every run of layers on every device.

Counts with the functions of ``cost.py`` and ``memory.py``, so that a plan's estimate and the search cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy

from splitrun.planner.cost import (
    activation_bytes,
    engine_hop_s,
    hop_s,
    objective_rows,
    stage_overhead_s,
    unit_s,
)
from splitrun.planner.facts import FORMATS, Cluster, Device, ModelProfile, Workload
from splitrun.planner.memory import (
    ALLOCATOR_SHARE,
    MARGIN_SHARE,
    UnitMemory,
    allocator_bytes,
    device_memory,
    kv_dtype_on,
    margin_bytes,
    pool_budgets,
    unit_memory,
)
from splitrun.planner.placement import KVSpec
from splitrun.planner.problem import INFINITE, Choice, Floats, Integers, Slot, Tables


def build_tables(
    profile: ModelProfile, cluster: Cluster, formats: Mapping[str, Sequence[str]], workload: Workload
) -> Tables:
    """The search problem for the devices that ``formats`` names, each in any of its formats."""
    devices = [device for device in cluster.devices if formats.get(device.name)]
    slots: list[Slot] = []
    sizes: list[int] = []
    for number, device in enumerate(devices):
        choices: dict[int, list[Choice]] = {}
        for weights in sorted(formats[device.name], key=FORMATS.index):
            size = activation_bytes(profile, device, weights)
            choices.setdefault(size, []).append(_choice(profile, device, workload, weights))
        for size, found in choices.items():
            slots.append(Slot(number, tuple(found)))
            sizes.append(size)
    prefill, rows = workload.objective == "first-token", objective_rows(workload)
    names = [devices[slot.device].name for slot in slots]

    def hops(source: str, targets: Sequence[str], size: int) -> list[float]:
        return [hop_s(cluster, source, target, size, workload, prefill, rows) for target in targets]

    return Tables(
        slots=tuple(slots),
        hop_s=numpy.array([hops(name, names, size) for name, size in zip(names, sizes, strict=True)]),
        enter_s=_each([engine_hop_s(cluster, name, workload, prefill, rows) for name in names]),
        leave_s=_each([engine_hop_s(cluster, name, workload, prefill, rows) for name in names]),
        budget_bytes=numpy.array([device.budget_bytes for device in devices], dtype=numpy.int64),
        pools=shared_pools(cluster, devices),
    )


def _choice(profile: ModelProfile, device: Device, workload: Workload, weights: str) -> Choice:
    layers, dtype = profile.layers, kv_dtype_on(device, weights)
    units = range(layers + 2)
    seconds = _each([unit_s(profile, unit, device, weights, workload, dtype) for unit in units])
    prefill, rows = workload.objective == "first-token", objective_rows(workload)
    stage_s = stage_overhead_s(profile, device, weights, workload, prefill, rows)
    ahead = numpy.concatenate([[0.0], numpy.cumsum(seconds[1:-1])])
    layer_s = numpy.where(_runs(layers), stage_s + ahead[None, :] - ahead[:, None], INFINITE)
    bills = [unit_memory(profile, unit, device, weights, workload, KVSpec(dtype=dtype)) for unit in units]
    shared = profile.tied_bytes.get(weights, 0)
    return Choice(
        number=FORMATS.index(weights),
        layer_s=layer_s,
        stage_s=stage_s,
        embed_s=float(seconds[0]),
        head_s=float(seconds[-1]),
        run_bytes=_run_bytes(device, bills, shared),
    )


def _runs(layers: int) -> numpy.typing.NDArray[numpy.bool_]:
    return numpy.triu(numpy.ones((layers + 1, layers + 1), dtype=numpy.bool_), 1)


def _each(values: list[float]) -> Floats:
    return numpy.array(values, dtype=numpy.float64)


def _run_bytes(device: Device, bills: Sequence[UnitMemory], shared: int) -> dict[tuple[bool, bool], Integers]:
    """All bytes of the device for each run of layers, with and without embed and head. Shape of each: (n + 1, n + 1).

    ``shared`` bytes are in both ends and paid once.
    """
    layers = len(bills) - 2
    held = [bill.weight_bytes + bill.kv_bytes + bill.state_bytes for bill in bills[1:-1]]
    ahead = numpy.concatenate([[0], numpy.cumsum(numpy.array(held, dtype=numpy.int64))])
    inner = ahead[None, :] - ahead[:, None]
    workspace = numpy.array([bill.workspace_bytes for bill in bills[1:-1]], dtype=numpy.int64)
    largest = numpy.zeros((layers + 1, layers + 1), dtype=numpy.int64)
    for start in range(layers):
        largest[start, start + 1 :] = numpy.maximum.accumulate(workspace[start:])
    result = {}
    for embed, head in ((False, False), (True, False), (False, True), (True, True)):
        ends = [bills[0]] * embed + [bills[-1]] * head
        base = device_memory(device, 0, ends, shared if embed and head else 0)
        total = base.weight_bytes + base.kv_bytes + base.state_bytes + inner
        fixed = base.context_bytes + allocator_bytes(device, 0) + margin_bytes(device, 0)
        sizes = (
            total
            + total // ALLOCATOR_SHARE
            + total // MARGIN_SHARE
            + numpy.maximum(largest, base.workspace_bytes)
            + fixed
        )
        sizes[~_runs(layers)] = 0
        numpy.fill_diagonal(sizes, base.total_bytes if ends else 0)
        result[embed, head] = sizes
    return result


def shared_pools(cluster: Cluster, devices: Sequence[Device]) -> tuple[tuple[tuple[int, ...], int], ...]:
    """(numbers of the devices, bytes) for each memory that more than one of the devices draws on."""
    members: dict[str, list[int]] = {}
    for number, device in enumerate(devices):
        members.setdefault(device.memory_pool, []).append(number)
    budgets = pool_budgets(cluster)
    return tuple((tuple(numbers), budgets[pool]) for pool, numbers in members.items() if len(numbers) > 1)
