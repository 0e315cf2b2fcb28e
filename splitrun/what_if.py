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

from splitrun.errors import InvalidPlacement

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

    Of a placement, what is left as it is by default is the placement's: context, sessions and objective; on this
    machine the devices, those that are here, and budgets; its format, or where it mixes several, as much precision as
    it has; int8 KV where a processor remains. Of a model: 4096 tokens, one session, every device, the fastest formats
    within ``quality``. ``memory`` may name devices that the changes add.
    """

    named: str
    changes: Changes
    machine: str | None = None
    facts: str | None = None
    memory: Memory | None = None
    context: int | None = None
    sessions: int | None = None
    objective: Objective = "latency"
    weights: str = ANY_FORMAT
    quality: str = ANY_LOSS
    kv: Literal["auto", "int8"] = "auto"
    revision: str | None = None
    load: Literal["weights", "dummy"] = "weights"


def answer(question: Question, report: Callable[[str], None] = lambda text: None) -> Placement:
    """The best placement on the changed machine. Raises as planning does, and InvalidPlacement for unknown names."""
    from splitrun.model.files import named_in
    from splitrun.planner.quality import check_quality
    from splitrun.planner.solve import solve

    if question.machine and question.facts:
        raise InvalidPlacement("--machine and --facts both say where to start; give one of them")
    check_quality(question.weights, question.quality)
    placement = _placement(question.named)
    asked = question if placement is None else _as_in(placement, question)
    with named_in(question.named) if placement else nullcontext():
        known = _known(asked, placement)
    weights, quality = _precision(asked, placement, known.profile)
    asked = replace(asked, weights=weights, quality=quality)
    workload = _workload(asked, placement, known.profile)
    found, notes = _changed(asked, placement, known, workload, report)
    plan = solve(found.profile, found.cluster.keeping(asked.kv), workload, weights, quality, stream=True)
    if plan.estimate is None or not notes:
        return plan
    return replace(plan, estimate=replace(plan.estimate, notes=(*plan.estimate.notes, *notes)))


def _placement(named: str) -> Placement | None:
    """The placement, where the question is about one."""
    if not named.endswith((".yaml", ".yml")):
        return None
    from splitrun.planner.placement import Placement

    return Placement.load(named)


def _as_in(placement: Placement, question: Question) -> Question:
    """The question about a placement's model."""
    model, kv = placement.model, "int8" if placement.int8_kv else question.kv
    return replace(question, named=model.source, revision=model.revision, kv=kv)


def _precision(question: Question, placement: Placement | None, profile: ModelProfile) -> tuple[str, str]:
    """Weight format or "auto", and the most that it may lose."""
    from splitrun.planner.quality import loss_share

    if placement is None or (question.weights, question.quality) != (ANY_FORMAT, ANY_LOSS):
        return question.weights, question.quality
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
        objective=workload.objective if question.objective == "latency" else question.objective,
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
        return read_facts_for(question.facts, question.named, None, question.kv)
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
    where = question.machine or question.facts or "this machine, changed,"
    here = [device.name for device in known.cluster.devices]
    memory, notes = question.memory, []
    if placement is not None and memory is None and live:
        names = placement.device_names
        notes = [f"{name}, which the placement uses, is not here" for name in names if name not in here]
        if set(names) & set(here):
            left = [name for name in names if name in here and name not in changes.drop]
            memory = {name: placement.devices.get(name, "auto") for name in left}
    changed(known.cluster, changes)
    start, later = started(here, memory, changes.drop)
    start = {name: size for name, size in start.items() if size != "auto" or known.cluster.device(name).budget_bytes}

    def after(cluster: Cluster) -> tuple[Cluster, list[str]]:
        others = [device.name for device in cluster.devices if device.name not in start]
        made, told = changed(cluster.without(others), replace(changes, drop=()))
        named = {device.name: device for device in with_budgets(made, later, where).devices}
        return replace(made, devices=tuple(named.get(device.name, device) for device in made.devices)), told

    made, _ = after(known.cluster)  # names that are not known are refused before anything is timed
    if placement is None or not placement.int8_kv:
        check_kv(made, question.kv)
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
    from splitrun.api import gather_facts
    from splitrun.planner.formats import allowed_formats
    from splitrun.planner.refuse import refuse_hopeless
    from splitrun.planner.solve import check_request

    def check(profile: ModelProfile, cluster: Cluster) -> None:
        check_request(profile, after(cluster), workload)

    def refuse(profile: ModelProfile, cluster: Cluster) -> None:
        refuse_hopeless(profile, after(cluster), workload, allowed_formats(profile, question.weights))

    return gather_facts(
        question.named, memory, question.weights, question.revision, question.load,
        tuple(sorted({1, workload.sessions})), report=report, kv=question.kv, check=check, refuse=refuse,
    )  # fmt: skip
