"""Answer what-if questions: this machine (or one from a data sheet, or from a facts file), changed, then planned for.

Asked about a placement, the start is what that plan has: its devices with their budgets, and its precision. Beside
``api.py``, which plans for what is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from splitrun.errors import DoesNotFit, InvalidPlacement

if TYPE_CHECKING:
    from splitrun.planner.facts import Cluster, ModelProfile, Objective, Workload
    from splitrun.planner.facts_file import Facts
    from splitrun.planner.placement import Placement
    from splitrun.planner.what_if import Changes

Memory = Mapping[str, str | int]
ANY_FORMAT, ANY_LOSS = "auto", "nf4"


@dataclass(frozen=True)
class Question:
    """What the user asks; ``named`` is a model or a placement file.

    What is None is, of a placement, the placement's: context, sessions and objective; unless ``machine`` is another,
    devices and budgets, of those that are there; its format, or where it mixes several, as much precision as it has;
    int8 KV where a processor remains. Of a model: 4096 tokens, one session, latency, every device, the fastest formats
    that lose no more than nf4. ``memory`` may name devices that the changes add.
    """

    named: str
    changes: Changes
    machine: str | None = None
    facts: str | None = None
    memory: Memory | None = None
    context: int | None = None
    sessions: int | None = None
    objective: Objective | None = None
    weights: str | None = None
    quality: str | None = None
    kv: Literal["auto", "int8"] | None = None
    revision: str | None = None
    load: Literal["weights", "dummy"] = "weights"


def answer(question: Question, report: Callable[[str], None] = lambda text: None) -> Placement:
    """The best placement on the changed machine. Raises as planning does, and InvalidPlacement for unknown names."""
    from splitrun.api import with_unused
    from splitrun.model.files import named_in
    from splitrun.planner.quality import check_quality
    from splitrun.planner.solve import solve

    if question.machine and question.facts:
        raise InvalidPlacement("--machine and --facts both say where to start; give one of them")
    check_quality(question.weights or ANY_FORMAT, question.quality or ANY_LOSS)
    placement = _placement(question.named)
    kv = question.kv or (placement.kv if placement else "auto")
    asked = replace(question, kv=kv)
    if placement is not None:
        asked = replace(asked, named=placement.model.source, revision=placement.model.revision)
    with named_in(question.named) if placement else nullcontext():
        known = _known(asked, placement)
    weights, quality = _precision(asked, placement, known.profile)
    workload = _workload(asked, placement, known.profile)
    asked = replace(asked, weights=weights)
    found, notes = _changed(asked, placement, known, workload, report)
    try:
        plan = solve(found.profile, found.cluster.keeping(kv), workload, weights, quality, stream=True)
    except DoesNotFit as error:
        raise with_unused(error, question.memory) from error
    if plan.estimate is None or not notes:
        return plan
    return replace(plan, estimate=replace(plan.estimate, notes=(*plan.estimate.notes, *notes)))


def _placement(named: str) -> Placement | None:
    """The placement, where the question is about one."""
    if not named.endswith((".yaml", ".yml")):
        return None
    from splitrun.planner.placement import Placement

    return Placement.load(named)


def _precision(question: Question, placement: Placement | None, profile: ModelProfile) -> tuple[str, str]:
    """Weight format or "auto", and the most that it may lose."""
    from splitrun.planner.quality import loss_share

    if placement is None or question.weights or question.quality:
        return question.weights or ANY_FORMAT, question.quality or ANY_LOSS
    formats = {stage.weights for stage in placement.stages}
    if len(formats) == 1:
        return formats.pop(), ANY_LOSS
    share = min(1.0, math.ceil(loss_share(profile, placement) * 1e4) / 1e4)
    return ANY_FORMAT, f"{share:g}"


def _workload(question: Question, placement: Placement | None, profile: ModelProfile) -> Workload:
    from splitrun.api import DEFAULT_CONTEXT
    from splitrun.planner.facts import Workload

    workload = placement.workload if placement else Workload(context=min(DEFAULT_CONTEXT, profile.max_context))
    return replace(
        workload,
        context=question.context or workload.context,
        sessions=question.sessions or workload.sessions,
        objective=question.objective or workload.objective,
    )


def _known(question: Question, placement: Placement | None) -> Facts:
    """The model and the devices before the changes: with what a facts file says, else nothing timed."""
    from splitrun.api import read_facts_for
    from splitrun.measure.budget import VIRTUAL_CPU
    from splitrun.measure.probe import probe
    from splitrun.measure.profile import profile
    from splitrun.model.files import resolve
    from splitrun.planner.facts_file import Facts
    from splitrun.planner.what_if import machine_of

    if question.facts is not None:
        return read_facts_for(question.facts, question.named, None, question.kv or "auto")
    files = resolve(question.named, question.revision, weights=question.load == "weights")
    if question.machine is not None:
        return Facts(profile(files), machine_of(question.machine))
    cluster = probe()
    named = question.memory or (placement.device_names if placement else ())
    virtual = [name for name in named if VIRTUAL_CPU.fullmatch(name)]
    if virtual:
        cluster = probe(dict.fromkeys([*(device.name for device in cluster.devices), *virtual], "auto"))
    return Facts(profile(files), cluster)


def _changed(
    question: Question, placement: Placement | None, known: Facts, workload: Workload, report: Callable[[str], None]
) -> tuple[Facts, list[str]]:
    """The facts after the changes, timed where they are this machine's, and what to know of the devices. Raises
    InvalidPlacement, and DoesNotFit where it is known before anything is timed."""
    from splitrun.planner.facts_file import Facts
    from splitrun.planner.solve import check_kv
    from splitrun.planner.what_if import changed, started, with_budgets

    changes, live = question.changes, question.machine is None and question.facts is None
    where = f"{question.machine or question.facts or 'this machine'}, changed,"
    here = [device.name for device in known.cluster.devices]
    memory, notes = question.memory, []
    if placement is not None and memory is None and question.machine is None:
        names = placement.device_names
        there = question.facts or "this machine"
        notes = [f"{there} has no {name}, which the placement uses" for name in names if name not in here]
        if set(names) & set(here):
            left = [name for name in names if name in here and name not in changes.drop]
            memory = {name: placement.devices.get(name, "auto") for name in left}
    changed(known.cluster, changes)
    start, later = started(here, memory, changes.drop)
    if not changes.add and not changes.add_node:
        with_budgets(known.cluster, later, where)
    start = {name: size for name, size in start.items() if size != "auto" or known.cluster.device(name).budget_bytes}

    def after(cluster: Cluster) -> tuple[Cluster, list[str]]:
        others = [device.name for device in cluster.devices if device.name not in start]
        made, told = changed(cluster.without(others), replace(changes, drop=()))
        named = {device.name: device for device in with_budgets(made, later, where).devices}
        return replace(made, devices=tuple(named.get(device.name, device) for device in made.devices)), told

    made, _ = after(known.cluster)  # names that are not known are refused before anything is timed
    if placement is None or placement.kv != "int8":
        check_kv(made, question.kv or ANY_FORMAT)
    if live and start:
        everything = memory is None and not changes.drop
        found = _timed(question, None if everything else start, workload, lambda cluster: after(cluster)[0], report)
    else:
        found = replace(known, cluster=with_budgets(known.cluster, start, where))
    cluster, told = after(found.cluster)
    return Facts(found.profile.of_devices(start), cluster, found.made_by), [*notes, *told]


def _timed(
    question: Question,
    memory: Memory | None,
    workload: Workload,
    after: Callable[[Cluster], Cluster],
    report: Callable[[str], None],
) -> Facts:
    """The facts of this machine's devices before the changes; refused is what cannot be ``after`` them."""
    from splitrun.api import gather_facts, refusals

    # Whether K and V may be int8 is known already: a placement's stay so only where a processor remains.
    check, refuse = refusals(lambda profile: workload, question.weights or ANY_FORMAT, ANY_FORMAT, after)
    return gather_facts(
        question.named, memory, question.weights or ANY_FORMAT, question.revision, question.load,
        tuple(sorted({1, workload.sessions})), report=report, kv=question.kv or "auto", check=check, refuse=refuse,
    )  # fmt: skip
