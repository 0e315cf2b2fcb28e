"""Does a placement still suit the model and the machine? Pure: compares facts, changes nothing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from splitrun.planner.facts import Cluster
from splitrun.planner.placement import Placement, is_processor
from splitrun.quantities import format_bytes


def stale_reasons(
    placement: Placement, profile_fingerprint: str | None, layers: int, cluster: Cluster, file: str = "FILE",
    max_context: int | None = None, processors: int | None = None, least: Mapping[str, int] | None = None,
) -> list[str]:  # fmt: skip
    """One sentence, with the command that mends it, for each way in which the placement no longer holds.

    Looks at: the model's fingerprint (when both sides have one), number of layers and longest context, devices that
    are not here, threads beyond the ``processors``, and memory: what the plan takes by its estimate (without one the
    bytes that it takes at ``least`` on each device) against its budget, and that, or the whole budget, against what is
    free. Empty: all is well.
    """
    command = _plan_again(placement, file)
    reasons = []
    recorded = placement.model.fingerprint
    if recorded and profile_fingerprint and recorded != profile_fingerprint:
        reasons.append(f"the model {placement.model.source} changed since it was planned; plan again: {command}")
    if placement.layers != layers:
        reasons.append(
            f"the placement splits {placement.layers} layers, but {placement.model.source} has {layers}; "
            f"plan again: {command}"
        )
    if max_context is not None and placement.workload.context > max_context:
        reasons.append(
            f"context {placement.workload.context} is longer than the {max_context} tokens that "
            f"{placement.model.source} knows; plan again: {_plan_again(placement, file, max_context)}"
        )
    here = {device.name: device for device in cluster.devices}
    for name in placement.device_names:
        if name not in here:
            reasons.append(f"device {name} is not here (here: {', '.join(here) or 'none'}); plan again: {command}")
    reasons += _budget_reasons(placement, cluster, command, least or {})
    for stage in placement.stages:
        here_on_processor = is_processor(stage.device) and "/" not in stage.device
        if here_on_processor and processors and stage.threads != "auto" and stage.threads > processors:
            reasons.append(
                f"the stage of {stage.units_text} asks for {stage.threads} threads, but this process may use "
                f"{processors} processors; write threads: auto, or {processors} at most"
            )
    return reasons


def _budget_reasons(placement: Placement, cluster: Cluster, command: str, least: Mapping[str, int]) -> list[str]:
    bills = () if placement.estimate is None else placement.estimate.devices
    predicted = {bill.device: bill.total_bytes for bill in bills}
    totals = {device.name: device.total_bytes for device in cluster.devices}
    reasons = [
        f"{name} has {format_bytes(totals[name])} of memory, and its budget is {format_bytes(budget)}; lower "
        f"devices.{name}.memory in the file, or plan again: {command}"
        for name, budget in placement.devices.items()
        if budget > totals.get(name, budget)
    ]
    reasons += [
        f"the plan takes {'' if predicted else 'at least '}{format_bytes(size)} on {name}, but its budget there is "
        f"{format_bytes(placement.devices[name])}; raise devices.{name}.memory in the file, or plan again: {command}"
        for name, size in (predicted or least).items()
        if size > placement.devices.get(name, size)
    ]
    needed: dict[str, int] = {}
    free: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    for device in cluster.devices:
        if not placement.has_device(device.name) or device.name not in placement.devices:
            continue
        pool, budget = device.memory_pool, placement.devices[device.name]
        if device.name in predicted:
            needed[pool] = needed.get(pool, 0) + min(budget, predicted[device.name])
        else:  # devices of one memory share one budget, so the largest counts and not the sum
            needed[pool] = max(needed.get(pool, 0), budget)
        free[pool] = max(free.get(pool, 0), device.free_bytes)
        names.setdefault(pool, []).append(device.name)
    return reasons + [
        f"the plan takes {format_bytes(size)} on {' and '.join(names[pool])}, but {format_bytes(free[pool])} is free; "
        f"free some memory or plan again: {command}"
        for pool, size in needed.items()
        if size > free[pool]
    ]


def _plan_again(placement: Placement, file: str, max_context: int | None = None) -> str:
    workload = placement.workload
    options = f"--context {max_context or workload.context}"
    if workload.sessions != 1:
        options += f" --sessions {workload.sessions}"
    if workload.objective != "latency":
        options += f" --objective {workload.objective}"
    formats = {stage.weights for stage in placement.stages}
    if len(formats) == 1 and formats != {"nf4"}:  # --weights auto may take less precise ones
        options += f" --weights {formats.pop()}"
    if placement.model.revision:
        options += f" --revision {shlex.quote(placement.model.revision)}"
    if placement.kv == "int8":
        options += " --kv int8"
    return f"splitrun plan {shlex.quote(placement.model.source)} {options} -o {shlex.quote(file)}"
