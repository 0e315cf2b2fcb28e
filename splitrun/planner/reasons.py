"""Why the plan is as it is: the constraint that binds, the runner-up, devices left out, and what would help most.

Every statement names a plan that exists: relaxed problems are solved with embed and head where they are now or on the
device that was given more, so what is promised can be had, and now and then a little more than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy

from splitrun.planner.facts import Cluster, Device, ModelProfile, Workload
from splitrun.planner.problem import INFINITE, Split, Tables, choice_of, excess_of, used_devices
from splitrun.planner.search import Outcome, fastest
from splitrun.planner.tables import build_tables
from splitrun.quantities import format_bytes, format_rate, format_seconds

WORTH_NAMING = 0.005
"""A gain below half a percent is no constraint worth a sentence."""
UNLIMITED_BYTES = 1 << 60
SHORTER = 4
"""The context that is tried as advice is one part in so many of the one asked for."""


@dataclass(frozen=True)
class Findings:
    """A solved problem: tables, answer, and the devices and workload behind the numbers."""

    tables: Tables
    outcome: Outcome
    devices: Sequence[Device]
    workload: Workload

    @property
    def bottleneck(self) -> bool:
        """Whether the slowest device counts."""
        return self.workload.objective == "throughput"


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


def runner_up(found: Findings) -> list[str]:
    """The best plan that does without one of the devices in use, and what it would cost; nothing when none fits."""
    split = found.outcome.split
    if split is None:
        return []
    values = {number: found.outcome.best_without(number) for number in used_devices(split)}
    device = min(values, key=lambda number: values[number], default=None)
    if device is None or values[device] == INFINITE:
        return []
    more = values[device] / found.outcome.value - 1
    return [
        f"the runner-up does without {found.devices[device].name} and takes "
        f"{measure_text(found.workload, values[device])}, {more:.0%} more"
    ]


def limit(found: Findings) -> str:
    """The memory that holds the plan back most and how much more of it would help, or the device that sets the pace."""
    tables, outcome, devices, workload = found.tables, found.outcome, found.devices, found.workload
    if outcome.split is None:
        return ""
    gains: list[tuple[float, str]] = []
    for members in _memories(tables):
        ends = {outcome.split.embed, outcome.split.head, *members}
        relaxed = fastest(_without_limit(tables, members), found.bottleneck, ends)
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
    return f"speed of {slowest(tables, outcome.split, devices)}; more memory would not help"


def more_context(
    found: Findings, profile: ModelProfile, cluster: Cluster, formats: Mapping[str, Sequence[str]]
) -> list[str]:
    """What a shorter context would gain, in a sentence; nothing when it is not worth one.

    The shorter plan is judged at the history of the longer one, so that only its smaller KV counts.
    """
    split, workload = found.outcome.split, found.workload
    context = workload.context // SHORTER // workload.block_tokens * workload.block_tokens
    if split is None or context < 2 * workload.block_tokens:
        return []
    history = workload.context // 2 if workload.history_tokens is None else workload.history_tokens
    shorter = replace(workload, context=context, history_tokens=history)
    ends = {split.embed, split.head}
    outcome = fastest(build_tables(profile, cluster, formats, shorter), found.bottleneck, ends)
    if workload.objective == "first-token" or outcome.value >= found.outcome.value * (1 - WORTH_NAMING):
        return []
    if workload.objective == "latency":
        rates = f"{format_rate(1 / outcome.value)} instead of {format_rate(1 / found.outcome.value)}"
    else:
        rates = f"{format_seconds(outcome.value)} instead of {measure_text(workload, found.outcome.value)}"
    return [
        f"--context {context} instead of {workload.context} would leave room for more on the faster device: {rates}"
    ]


def _memories(tables: Tables) -> list[tuple[int, ...]]:
    """The devices of each memory."""
    shared = [members for members, _ in tables.pools]
    single = set(range(tables.devices)) - {member for members in shared for member in members}
    return sorted([*shared, *((number,) for number in single)])


def _without_limit(tables: Tables, members: tuple[int, ...]) -> Tables:
    budgets = tables.budget_bytes.copy()
    budgets[numpy.array(members)] = UNLIMITED_BYTES
    return replace(tables, budget_bytes=budgets, pools=tuple(pool for pool in tables.pools if pool[0] != members))


def slowest(tables: Tables, split: Split, devices: Sequence[Device]) -> str:
    """The name of the device that computes longest."""
    busy = dict.fromkeys(used_devices(split), 0.0)
    bounds = dict.fromkeys(busy, (0, 0)) | {device: (start, stop) for device, start, stop in split.runs}
    for device, run in bounds.items():
        choice = choice_of(tables, device, split.formats[device])
        busy[device] = float(choice.seconds(device == split.embed, device == split.head)[run])
    return devices[max(busy, key=busy.__getitem__)].name
