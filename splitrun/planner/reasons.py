"""Why the plan is as it is: the constraint that binds, the runner-up, devices left out, and what would help most.

Every statement names a plan that exists, and that keeps the precision which was asked for: relaxed problems are solved
with embed and head where they are now or on the device that was given more (anywhere, where the fastest would lose too
much), so what is promised can be had, and now and then a little more than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy

from splitrun.planner.alike import classes_of
from splitrun.planner.facts import FORMATS, Cluster, Device, ModelProfile, Workload
from splitrun.planner.losses import Losses
from splitrun.planner.many import least_possible
from splitrun.planner.placement import Placement
from splitrun.planner.problem import INFINITE, Split, Tables, busy_s, excess_of, used_devices
from splitrun.planner.search import Outcome, fastest
from splitrun.planner.tables import build_tables
from splitrun.planner.within import fastest_within
from splitrun.quantities import format_bytes, format_rate, format_seconds

WORTH_NAMING = 0.005
"""A gain below half a percent is no constraint worth a sentence."""
MEASURES = {
    "latency": "per token",
    "throughput": "a step on the busiest device",
    "first-token": "to the first token",
}
UNLIMITED_BYTES = 1 << 60
LAYERS = 1
"""Of a device's formats, those of embedding, layers and head, the layers'."""
SHORTER = 4
"""The context that is tried as advice is one part in so many of the one asked for."""


@dataclass(frozen=True)
class Findings:
    """A solved problem: tables, answer, and the model, cluster, formats of each device and workload behind the numbers.

    ``devices`` are those of the tables. ``own_s`` are the engine's seconds beside stages and hops, as the plan has
    them: another plan that reads main memory instead takes a fraction of a millisecond more, beside many of its own.
    ``most_loss`` is what any plan may lose in precision.
    """

    tables: Tables
    outcome: Outcome
    devices: Sequence[Device]
    profile: ModelProfile
    cluster: Cluster
    formats: Mapping[str, Sequence[str]]
    workload: Workload
    own_s: float = 0.0
    most_loss: float = INFINITE

    def fastest(
        self,
        tables: Tables,
        ends: Set[int] | None = None,
        formats: Mapping[str, Sequence[str]] | None = None,
        workload: Workload | None = None,
    ) -> tuple[Tables, Outcome]:
        """The best split of a problem like this one within what plans may lose, and the tables that it is of: these, or
        where the fastest loses too much, those where each part of a device has a format of its own."""
        outcome = fastest(tables, self.bottleneck, ends)
        if self.most_loss == INFINITE:
            return tables, outcome
        if outcome.split is not None and Losses.of(self.profile, tables).split(outcome.split) <= self.most_loss:
            return tables, outcome
        made = build_tables(self.profile, self.cluster, formats or self.formats, workload or self.workload, apart=True)
        apart = replace(made, budget_bytes=tables.budget_bytes, pools=tables.pools)
        return apart, fastest_within(apart, self.profile, self.bottleneck, self.most_loss)

    def best_without(self, device: int) -> float:
        """The best value among the plans that do without that device."""
        if self.most_loss == INFINITE:
            return self.outcome.best_without(device)
        budgets = self.tables.budget_bytes.copy()
        budgets[device] = 0
        return self.fastest(replace(self.tables, budget_bytes=budgets))[1].value

    @property
    def bottleneck(self) -> bool:
        """Whether the slowest device counts."""
        return self.workload.objective == "throughput"

    def instead(self, seconds: float) -> str:
        """A value of the objective beside that of the plan: "18.0 instead of 12.3 tok/s"."""
        own_s = 0.0 if self.bottleneck else self.own_s
        each = [value + own_s for value in (seconds, self.outcome.value)]
        if self.workload.objective == "latency":
            other, now = (format_rate(1 / value).removesuffix(" tok/s") for value in each)
            unit = "tok/s"
        else:
            (other, now), unit = map(format_seconds, each), MEASURES[self.workload.objective]
        if other == now:
            more = each[0] / each[1] - 1
            exactly = f", {abs(more):.1%} {'more' if more > 0 else 'less'} time" if abs(more) >= 0.0005 else " too"
            return f"{other} {unit}{exactly}"
        return f"{other} instead of {now} {unit}"


def measure_text(workload: Workload, seconds: float) -> str:
    """The objective's value in words."""
    return f"{format_seconds(seconds)} {MEASURES[workload.objective]}"


def left_out(found: Findings) -> list[str]:
    """One sentence for each device that the best plan does not use; devices that are alike share one."""
    outcome = found.outcome
    if outcome.split is None:
        return []
    used, sentences = set(used_devices(outcome.split)), []
    for members in classes_of(found.tables):
        rest = [number for number in members if number not in used]
        if not rest:
            continue
        value, it = outcome.best_with(rest[0]), "it" if len(rest) == 1 else "one of them"
        text = " and ".join(found.devices[number].name for number in rest) + " " + ("was", "were")[len(rest) > 1]
        if not outcome.by_devices or found.most_loss < INFINITE:  # all that is known is that this plan is the best
            sentences.append(f"{text} left out: {it} would gain nothing")
        elif value == INFINITE:
            sentences.append(f"{text} left out: no plan that uses {it} keeps the budgets")
        elif value <= outcome.value * (1 + 1e-9):
            sentences.append(f"{text} left out: {it} would gain nothing")
        else:
            sentences.append(f"{text} left out; the best plan with {it}: {found.instead(value)}")
    return sentences


def runner_up(found: Findings) -> list[str]:
    """The best plan that does without one of the devices in use, and what it would cost; nothing when none fits."""
    split = found.outcome.split
    if split is None:
        return []
    best, least = None, INFINITE
    for device in sorted(used_devices(split), key=found.outcome.best_without):
        if found.outcome.best_without(device) >= least:
            break  # whatever plans may lose: within that they are no faster
        if (value := found.best_without(device)) < least:
            best, least = device, value
    if best is None:
        return []
    return [f"the best plan without {found.devices[best].name}: {found.instead(least)}"]


def other_format(found: Findings) -> list[str]:
    """The best plan without the format of most layers, and what it would cost; nothing when none fits."""
    split = found.outcome.split
    if split is None:
        return []
    number = max(split.runs, key=lambda run: run[2] - run[1])[0]
    main = FORMATS[split.formats[number][LAYERS]]
    rest = {name: tuple(each for each in known if each != main) for name, known in found.formats.items()}
    if not any(rest.values()):
        return []
    _, outcome = found.fastest(build_tables(found.profile, found.cluster, rest, found.workload), formats=rest)
    if outcome.split is None:
        return []
    instead = FORMATS[outcome.split.formats[outcome.split.runs[0][0]][LAYERS]]
    return [f"the runner-up has weights in {instead}, not {main}: {found.instead(outcome.value)}"]


def limit(found: Findings) -> str:
    """The memory that holds the plan back most and how much more of it would help, or the device that sets the pace."""
    tables, outcome, devices = found.tables, found.outcome, found.devices
    if outcome.split is None:
        return ""
    gains: list[tuple[float, str]] = []
    worth = outcome.value * (1 - WORTH_NAMING)
    for members in _memories(tables, set(used_devices(outcome.split))):
        ends, ample = {outcome.split.embed, outcome.split.head, *members}, _without_limit(tables, members)
        if least_possible(ample, found.bottleneck) >= worth:
            continue  # its layers are no quicker than those of devices that have room
        of, relaxed = found.fastest(ample, ends)
        if relaxed.split is None or relaxed.value >= worth:
            continue
        held = replace(of, budget_bytes=tables.budget_bytes, pools=tables.pools)
        more = format_bytes(sum(excess_of(held, relaxed.split)))
        name = " and ".join(devices[member].name for member in members)
        gains.append((relaxed.value, f"memory of {name}: {more} more there would give {found.instead(relaxed.value)}"))
    if gains:
        return min(gains)[1]
    return f"speed of {slowest(tables, outcome.split, devices)}; more memory would not help"


def more_context(found: Findings) -> list[str]:
    """What a shorter context would gain, in a sentence; nothing when it is not worth one.

    The shorter plan is judged at the history of the longer one, so that only its smaller KV counts.
    """
    split, workload = found.outcome.split, found.workload
    context = workload.context // SHORTER // workload.block_tokens * workload.block_tokens
    if split is None or context < 2 * workload.block_tokens or workload.objective == "first-token":
        return []
    history = workload.context // 2 if workload.history_tokens is None else workload.history_tokens
    shorter = replace(workload, context=context, history_tokens=history)
    ends = {split.embed, split.head}
    tables = build_tables(found.profile, found.cluster, found.formats, shorter)
    _, outcome = found.fastest(tables, ends, workload=shorter)
    if outcome.value >= found.outcome.value * (1 - WORTH_NAMING):
        return []
    gain = found.instead(outcome.value)
    return [f"--context {context} instead of {workload.context} would leave room for more on the faster device: {gain}"]


def untimed(profile: ModelProfile, cluster: Cluster, placement: Placement) -> list[str]:
    """What the figures of devices rest on where the model's layers were not timed there."""
    used = dict.fromkeys((stage.device, stage.weights) for stage in placement.stages)
    missing = [(cluster.device(name), weights) for name, weights in used if (name, weights) not in profile.seconds]
    sheets = dict.fromkeys(device for device, _ in missing if device.source == "datasheet")
    sentences = [
        f"{weights} on {device.name} was not timed: its figures follow from the device's bandwidth"
        for device, weights in missing
        if device not in sheets
    ]
    if sheets:
        names = (f"{device.name} is {device.description.removesuffix(' (datasheet)')}" for device in sheets)
        sentences.append(f"from published figures, not measured: {', '.join(names)}")
    return sentences


def calibrations(profile: ModelProfile, placement: Placement) -> list[str]:
    """A sentence for each device and format in use whose seconds were multiplied by what a run told."""
    used = sorted({(stage.device, stage.weights) for stage in placement.stages} & set(profile.factors))
    found = [(*each, profile.factors[each]) for each in used]
    return [
        f"calibrated by a run{' of other formats' if factor.borrowed else ''}: {weights} on {name} takes "
        f"{factor.decode:.2f} times its units' seconds decoding, {factor.prefill:.2f} times for prompts (--no-cache "
        "forgets that)"
        for name, weights, factor in found
        if max(abs(factor.decode - 1), abs(factor.prefill - 1)) > WORTH_NAMING
    ]


def _memories(tables: Tables, used: Set[int]) -> list[tuple[int, ...]]:
    """The devices of each memory; of devices that are alike one, if it may be in use."""
    shared = [members for members, _ in tables.pools]
    together = {member for members in shared for member in members}
    single = [min(members, key=lambda number: (number not in used, number)) for members in classes_of(tables)]
    return sorted([*shared, *((number,) for number in single if number not in together)])


def _without_limit(tables: Tables, members: tuple[int, ...]) -> Tables:
    budgets = tables.budget_bytes.copy()
    budgets[numpy.array(members)] = UNLIMITED_BYTES
    return replace(tables, budget_bytes=budgets, pools=tuple(pool for pool in tables.pools if pool[0] != members))


def slowest(tables: Tables, split: Split, devices: Sequence[Device]) -> str:
    """The name of the device that computes longest."""
    busy = busy_s(tables, split)
    return devices[max(sorted(busy), key=busy.__getitem__)].name
