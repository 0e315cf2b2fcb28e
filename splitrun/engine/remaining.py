"""Plans without the machines that are lost for good: anew over what remains, or the lost stages on this machine and all
others where they are. Knows facts and placements, loads nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import inf

from splitrun.cluster.process import machine_of
from splitrun.errors import InvalidPlacement, SplitrunError
from splitrun.planner.cost import score
from splitrun.planner.facts import Device
from splitrun.planner.facts_file import Facts
from splitrun.planner.memory import computes_layers, device_memory, unit_memory
from splitrun.planner.placement import Placement, StageSpec, is_processor
from splitrun.planner.solve import solve

MUCH_FASTER = 1.25
"""How much longer a token may take with the lost stages here than by a plan from scratch, which moves other stages too
and costs a pause in which all of them are loaded and all tokens computed again."""


def _moved(spec: StageSpec, device: str) -> StageSpec:
    """The stage on another device, in a type that it can keep K and V in."""
    kept = spec.kv if spec.kv.dtype != "int8" or is_processor(device) else replace(spec.kv, dtype=None)
    return replace(spec, device=device, kv=kept)


def plan_without(placement: Placement, facts: Facts, lost: Collection[str]) -> Placement:
    """The same model, workload and formats on the devices of ``facts``. Raises DoesNotFit or InvalidPlacement."""
    formats = {(spec.weights, spec.kv.dtype) for spec in placement.stages}
    if len(formats) == 1:
        ((weights, kv_dtype),) = formats
        cluster = facts.cluster
        if kv_dtype == "int8" and any(device.kind == "cpu" for device in cluster.devices):
            cluster = cluster.keeping(kv_dtype)
        found = solve(facts.profile, cluster, placement.workload, weights, stream=True)
        wanted = None if kv_dtype == "int8" else kv_dtype
        stages = tuple(replace(spec, kv=replace(spec.kv, dtype=wanted or spec.kv.dtype)) for spec in found.stages)
        return replace(found, model=placement.model, stages=stages)
    taken = max(facts.cluster.devices, key=lambda device: device.budget_bytes, default=None)
    if taken is None:
        raise InvalidPlacement("no device remains")
    here = [
        _moved(spec, taken.name) if (machine_of(spec.device) or spec.device) in lost else spec
        for spec in placement.stages
    ]
    return replace(placement, stages=tuple(here), devices={}, estimate=None)


def placement_here(
    placement: Placement, facts: Facts, lost: Collection[str], stages: Collection[int], kept_bytes: int
) -> Placement | None:
    """The placement with these stages on that device of this machine which has room for them and computes them fastest;
    None where there is no such device, or a plan from scratch without the ``lost`` machines would be much faster.

    ``facts``: of what remains, with what is free now that the other stages are loaded. ``kept_bytes``: what is kept in
    main memory for recovery beside them.
    """
    known = {device.name for device in facts.cluster.devices}
    found: list[tuple[float, Placement]] = []
    for device in facts.cluster.devices:
        if "/" in device.name or not all(placement.stages[index].weights in device.formats for index in stages):
            continue
        specs = enumerate(placement.stages)
        moved = tuple(_moved(spec, device.name) if index in stages else spec for index, spec in specs)
        here = replace(placement, stages=moved, estimate=None)
        beside = kept_bytes if device.name == "cpu" else 0
        if known.issuperset(here.device_names) and _has_room(facts, here, device, stages, beside):
            found.append((score(facts.profile, facts.cluster, here), here))
    if not found:
        return None
    seconds, best = min(found, key=lambda each: each[0])
    return best if seconds <= MUCH_FASTER * _best_s(placement, facts, lost) else None


def _has_room(facts: Facts, placement: Placement, device: Device, stages: Collection[int], beside_bytes: int) -> bool:
    """Whether ``stages`` fit there with the device's others: in its budget, and in what those have left free."""
    own = [index for index, spec in enumerate(placement.stages) if spec.device == device.name]
    paid = device.context_bytes if device.kind == "cpu" or len(own) > len(stages) else 0
    budget = placement.devices.get(device.name, device.total_bytes)
    needed = _bill_bytes(facts, placement, device, stages) - paid
    return _bill_bytes(facts, placement, device, own) + beside_bytes <= budget and needed <= device.free_bytes


def _bill_bytes(facts: Facts, placement: Placement, device: Device, stages: Collection[int]) -> int:
    """What a device takes that computes these stages."""
    units = [
        unit_memory(facts.profile, unit, device, spec.weights, placement.workload, spec.kv)
        for spec in (placement.stages[index] for index in stages)
        for unit in spec.units
    ]
    used = device.in_use(any(computes_layers(placement.stages[index]) for index in stages))
    return device_memory(used, device.budget_bytes, units).total_bytes if units else 0


def _best_s(placement: Placement, facts: Facts, lost: Collection[str]) -> float:
    """What the objective takes by a plan from scratch, once the stages here have given back what they hold; infinite
    where there is none."""
    devices = []
    for device in facts.cluster.devices:
        own = [index for index, spec in enumerate(placement.stages) if spec.device == device.name]
        held = _bill_bytes(facts, placement, device, own) if "/" not in device.name else 0
        most = placement.devices.get(device.name, device.total_bytes)
        devices.append(replace(device, budget_bytes=min(most, device.budget_bytes + held)))
    cluster = replace(facts.cluster, devices=tuple(devices))
    try:
        best = plan_without(placement, replace(facts, cluster=cluster), lost)
    except SplitrunError:
        return inf
    return score(facts.profile, cluster, best)
