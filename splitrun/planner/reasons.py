"""Why the plan is as it is: the constraint that binds, and the devices left out, each with its number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy

from splitrun.planner.facts import Device, Workload
from splitrun.planner.search import INFINITE, Outcome, Split, Tables, excess_of, fastest, used_devices
from splitrun.quantities import format_bytes, format_seconds

WORTH_NAMING = 0.005
"""A gain below half a percent is no constraint worth a sentence."""
UNLIMITED_BYTES = 1 << 60


def measure_text(workload: Workload, seconds: float) -> str:
    """The objective's value in words."""
    what = {"latency": "per token", "throughput": "on its busiest device per step"}
    return f"{format_seconds(seconds)} {what.get(workload.objective, 'to the first token')}"


def left_out(outcome: Outcome, devices: Sequence[Device], workload: Workload) -> list[str]:
    """One sentence for each device that the best plan does not use."""
    if outcome.split is None:
        return []
    sentences = []
    for number in sorted(set(range(len(devices))) - set(used_devices(outcome.split))):
        name, value = devices[number].name, outcome.best_with(number)
        if value == INFINITE:
            sentences.append(f"{name} was left out: no plan that uses it keeps the budgets")
        elif value <= outcome.value * (1 + 1e-9):
            sentences.append(f"{name} was left out: it would gain nothing")
        else:
            best = measure_text(workload, outcome.value)
            sentences.append(
                f"{name} was left out: with it the best plan takes {format_seconds(value)} instead of {best}"
            )
    return sentences


def limit(tables: Tables, outcome: Outcome, devices: Sequence[Device], workload: Workload) -> str:
    """The memory that holds the plan back most and how much more of it would help, or the device that sets the pace."""
    gains: list[tuple[float, str]] = []
    for members in _memories(tables):
        relaxed = fastest(_without_limit(tables, members), workload.objective == "throughput")
        if relaxed.split is None or relaxed.value >= outcome.value * (1 - WORTH_NAMING):
            continue
        more = sum(excess_of(tables, relaxed.split))
        name = " and ".join(devices[member].name for member in members)
        gains.append(
            (
                relaxed.value,
                f"memory of {name}: with {format_bytes(more)} more the plan would take "
                f"{format_seconds(relaxed.value)} instead of {measure_text(workload, outcome.value)}",
            )
        )
    if gains:
        return min(gains)[1]
    return f"speed of {_slowest(tables, outcome.split, devices)}; more memory would not help"


def _memories(tables: Tables) -> list[tuple[int, ...]]:
    """The devices of each memory."""
    shared = [members for members, _ in tables.pools]
    single = set(range(tables.devices)) - {member for members in shared for member in members}
    return sorted([*shared, *((number,) for number in single)])


def _without_limit(tables: Tables, members: tuple[int, ...]) -> Tables:
    budgets = tables.budget_bytes.copy()
    budgets[numpy.array(members)] = UNLIMITED_BYTES
    return replace(tables, budget_bytes=budgets, pools=tuple(pool for pool in tables.pools if pool[0] != members))


def _slowest(tables: Tables, split: Split | None, devices: Sequence[Device]) -> str:
    if split is None:
        return "no device"
    busy = [0.0] * tables.devices
    for device, start, stop in split.runs:
        busy[device] += float(tables.layer_s[device, start, stop])
    busy[split.embed] += float(tables.embed_s[split.embed])
    busy[split.head] += float(tables.head_s[split.head])
    return devices[max(range(tables.devices), key=busy.__getitem__)].name
