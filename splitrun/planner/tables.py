"""From facts to the numbers the search works on: seconds and bytes of every run of layers on every device.

Counts with the functions of ``cost.py`` and ``memory.py``, so that a plan's estimate and the search cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from splitrun.planner.cost import ENGINE_DEVICE, TOKEN_BYTES, activation_bytes, hop_s, objective_rows, unit_s
from splitrun.planner.facts import Cluster, Device, ModelProfile, Workload
from splitrun.planner.memory import (
    MARGIN_SHARE,
    compute_dtype,
    device_memory,
    margin_bytes,
    pool_budgets,
    unit_memory,
)
from splitrun.planner.placement import KVSpec
from splitrun.planner.search import INFINITE, Floats, Integers, Tables


def build_tables(
    profile: ModelProfile, cluster: Cluster, devices: Sequence[Device], workload: Workload, weights: str
) -> Tables:
    """The search problem for one weight format on those devices of the cluster."""
    layers, count = profile.layers, len(devices)
    units = range(layers + 2)
    seconds = numpy.zeros((count, layers + 2))
    for row, device in enumerate(devices):
        dtype = compute_dtype(device, weights)
        seconds[row] = [unit_s(profile, unit, device, weights, workload, dtype) for unit in units]
    layer_s = numpy.full((count, layers + 1, layers + 1), INFINITE)
    for start in range(layers):
        layer_s[:, start, start + 1 :] = numpy.cumsum(seconds[:, start + 1 : layers + 1], axis=1)
    prefill, rows = workload.objective == "first-token", objective_rows(workload)
    hops = numpy.zeros((count, count))
    for row, device in enumerate(devices):
        size = activation_bytes(profile, device, weights)
        hops[row] = [hop_s(cluster, device.name, target.name, size, workload, prefill, rows) for target in devices]
    names = [device.name for device in devices]
    return Tables(
        layer_s=layer_s,
        embed_s=seconds[:, 0],
        head_s=seconds[:, layers + 1],
        run_bytes={
            (embed, head): numpy.stack(
                [_run_bytes(profile, device, workload, weights, embed, head) for device in devices]
            )
            for embed in (False, True)
            for head in (False, True)
        },
        hop_s=hops,
        enter_s=_each([hop_s(cluster, ENGINE_DEVICE, name, TOKEN_BYTES, workload, prefill, rows) for name in names]),
        leave_s=_each([hop_s(cluster, name, ENGINE_DEVICE, TOKEN_BYTES, workload, prefill, rows) for name in names]),
        budget_bytes=numpy.array([device.budget_bytes for device in devices], dtype=numpy.int64),
        pools=shared_pools(cluster, devices),
    )


def _each(values: list[float]) -> Floats:
    return numpy.array(values, dtype=numpy.float64)


def _run_bytes(
    profile: ModelProfile, device: Device, workload: Workload, weights: str, embed: bool, head: bool
) -> Integers:
    """All bytes of the device for each run of layers, with embed and head as given. Shape: (n + 1, n + 1)."""
    layers = profile.layers
    dtype = KVSpec(dtype=compute_dtype(device, weights))
    bills = [unit_memory(profile, unit, device, weights, workload, dtype) for unit in range(layers + 2)]
    ends = [bills[0]] * embed + [bills[-1]] * head
    shared = profile.tied_bytes.get(weights, 0) if embed and head else 0
    base = device_memory(device, 0, ends, shared)
    held = numpy.array(
        [bill.weight_bytes + bill.kv_bytes + bill.state_bytes for bill in bills[1:-1]], dtype=numpy.int64
    )
    workspace = numpy.array([bill.workspace_bytes for bill in bills[1:-1]], dtype=numpy.int64)
    held_at_ends = base.weight_bytes + base.kv_bytes + base.state_bytes
    fixed = base.context_bytes + margin_bytes(device, 0)
    result = numpy.zeros((layers + 1, layers + 1), dtype=numpy.int64)
    numpy.fill_diagonal(result, base.total_bytes if ends else 0)
    for start in range(layers):
        total = held_at_ends + numpy.cumsum(held[start:])
        largest = numpy.maximum(numpy.maximum.accumulate(workspace[start:]), base.workspace_bytes)
        result[start, start + 1 :] = total + total // MARGIN_SHARE + largest + fixed
    return result


def shared_pools(cluster: Cluster, devices: Sequence[Device]) -> tuple[tuple[tuple[int, ...], int], ...]:
    """(numbers of the devices, bytes) for each memory that more than one of the devices draws on."""
    members: dict[str, list[int]] = {}
    for number, device in enumerate(devices):
        members.setdefault(device.memory_pool, []).append(number)
    budgets = pool_budgets(cluster)
    return tuple((tuple(numbers), budgets[pool]) for pool, numbers in members.items() if len(numbers) > 1)
