"""What is kept for the case that a stage in another process is lost, in room that nothing else of the plan takes.

First what stages send to such a stage, by all senders or by none; then KV, in the process that plans on ``cpu``, of
each stage all or nothing. Knows bytes, not how anything comes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from splitrun.planner import kv
from splitrun.planner.estimate import DeviceMemory
from splitrun.planner.facts import VALUE_BYTES, Cluster, ModelProfile, Workload
from splitrun.planner.memory import compute_dtype, pool_budgets
from splitrun.planner.placement import Placement, StageSpec

KEEPER = "cpu"
"""The device whose budget pays for KV of stages in other processes."""


def elsewhere(device: str) -> bool:
    """Whether a device's stages run in a process of their own, which can be lost alone."""
    return "/" in device


def senders(placement: Placement) -> list[StageSpec]:
    """The stages on processors that send their activations to another process, which can be lost."""
    pairs = zip(placement.stages, placement.stages[1:], strict=False)
    return [
        stage
        for stage, following in pairs
        if elsewhere(following.device) and following.device != stage.device and _on_processor(stage.device)
    ]


def journal_bytes(workload: Workload, hidden_values: int, dtype: str) -> int:
    """Bytes of the activations of all sessions at full context."""
    return workload.sessions * workload.context * hidden_values * VALUE_BYTES[dtype]


def shares(needed: Mapping[int, int], room_bytes: int) -> dict[int, int]:
    """Stage -> bytes for its KV: in order, all that it needs, or 0 where too little is left."""
    given = {}
    for stage, size in needed.items():
        given[stage] = size if size <= room_bytes else 0
        room_bytes -= given[stage]
    return given


def with_kept(
    profile: ModelProfile, cluster: Cluster, placement: Placement, bills: Sequence[DeviceMemory]
) -> tuple[DeviceMemory, ...]:
    """The bills with what is kept in the room that they leave."""
    kept = dict.fromkeys((bill.device for bill in bills), 0)
    room = _room(cluster, bills)
    journals = dict(kept)
    for stage in senders(placement):
        dtype = compute_dtype(cluster.device(stage.device), stage.weights)
        journals[stage.device] += journal_bytes(placement.workload, profile.hidden_values, dtype)
    if all(size <= max(room[device], 0) for device, size in journals.items()):
        kept = journals
    if KEEPER in kept and not any(unit.state_bytes for unit in profile.units):
        given = shares(_kv_bytes(profile, cluster, placement), room[KEEPER] - kept[KEEPER])
        kept[KEEPER] += sum(given.values())
    return tuple(replace(bill, kept_bytes=kept[bill.device]) for bill in bills)


def _kv_bytes(profile: ModelProfile, cluster: Cluster, placement: Placement) -> dict[int, int]:
    """Stage in another process -> bytes of its KV."""
    needed = {}
    for index, stage in enumerate(placement.stages):
        dtype = stage.kv.dtype or compute_dtype(cluster.device(stage.device), stage.weights)
        units = (profile.units[unit] for unit in stage.units)
        arguments = (profile.groups, placement.workload, dtype, stage.kv.device_blocks)
        size = sum(kv.unit_kv_bytes(unit, *arguments) for unit in units)
        if elsewhere(stage.device) and size:
            needed[index] = size
    return needed


def _room(cluster: Cluster, bills: Sequence[DeviceMemory]) -> dict[str, int]:
    """Device -> bytes that its bill, and those of its memory's other devices, leave of the budgets."""
    left = pool_budgets(cluster)
    for bill in bills:
        left[bill.memory_pool] = left.get(bill.memory_pool, bill.budget_bytes) - bill.total_bytes
    return {bill.device: min(bill.budget_bytes - bill.total_bytes, left[bill.memory_pool]) for bill in bills}


def _on_processor(device: str) -> bool:
    return device.rpartition("/")[2].partition(":")[0] == "cpu"
