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

    Of a placement, what is not said is the placement's: context, sessions and objective; devices and budgets, unless
    ``machine`` is another; its format, or where it mixes several, as much precision as it has; int8 KV. Of a model:
    4096 tokens, one session, every device, the fastest formats within ``quality``. ``memory`` may name devices that the
    changes add.
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
    from splitrun.model.files import named_in, resolve
    from splitrun.planner.quality import loss_share
    from splitrun.planner.solve import check_kv, solve

    if question.machine and question.facts:
        raise InvalidPlacement("--machine and --facts both say where to start; give one of them")
    placement = _placement(question.named)
    with named_in(question.named) if placement else nullcontext():
        asked = question if placement is None else _as_in(placement, question)
        if asked.facts is None:
            resolve(
                asked.named, asked.revision, weights=asked.load == "weights"
            )  # a model that is not here comes first
        found, notes = _changed(asked, report)
    quality = asked.quality
    if placement is not None and (asked.weights, quality) == (ANY_FORMAT, ANY_LOSS):
        quality = f"{math.ceil(loss_share(found.profile, placement) * 1e4) / 1e4:g}"
    check_kv(found.cluster, asked.kv)
    workload = _workload(asked, placement, found.profile)
    plan = solve(found.profile, found.cluster.keeping(asked.kv), workload, asked.weights, quality, stream=True)
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
    """The question about a placement's model, with what the placement says where the question does not."""
    formats = {stage.weights for stage in placement.stages}
    memory = question.memory
    if memory is None and question.machine is None:
        memory = {name: placement.devices.get(name, "auto") for name in placement.device_names}
    weights = question.weights
    if (weights, question.quality) == (ANY_FORMAT, ANY_LOSS) and len(formats) == 1:
        weights = formats.pop()
    return replace(
        question,
        named=placement.model.source,
        revision=placement.model.revision,
        memory=memory,
        weights=weights,
        sessions=question.sessions or placement.workload.sessions,
        kv="int8" if placement.int8_kv else question.kv,
    )


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


def _changed(question: Question, report: Callable[[str], None]) -> tuple[Facts, list[str]]:
    """The facts after the changes, and what to know of the devices added. Raises InvalidPlacement."""
    from splitrun.planner.what_if import changed, started, with_budgets

    here, where = _here(question), question.machine or question.facts or "this machine, changed,"
    changed(here, question.changes)
    start, later = started([device.name for device in here.devices], question.memory, question.changes.drop)
    changes = replace(question.changes, drop=())

    def after(cluster: Cluster) -> tuple[Cluster, list[str]]:
        found, notes = changed(cluster, changes)
        return with_budgets(found, later, where, others=True), notes

    after(here.without([device.name for device in here.devices if device.name not in start]))  # before all is timed
    found = _measured(question, here, start, report)
    cluster, notes = after(found.cluster)
    return replace(found, cluster=cluster), notes


def _here(question: Question) -> Cluster:
    """The devices before the changes, none of them timed with the model."""
    from splitrun.api import read_facts_for
    from splitrun.measure.budget import VIRTUAL_CPU
    from splitrun.measure.probe import probe
    from splitrun.planner.what_if import machine_of

    if question.facts is not None:
        return read_facts_for(question.facts, question.named, None, question.kv).cluster
    if question.machine is not None:
        return machine_of(question.machine)
    every = probe()
    virtual = {name: size for name, size in (question.memory or {}).items() if VIRTUAL_CPU.fullmatch(name)}
    return probe({device.name: "auto" for device in every.devices} | virtual) if virtual else every


def _measured(question: Question, here: Cluster, start: Memory, report: Callable[[str], None]) -> Facts:
    """The facts of those devices, with those budgets."""
    from splitrun.api import gather_facts, read_facts_for
    from splitrun.measure.profile import profile
    from splitrun.model.files import resolve
    from splitrun.planner.facts_file import Facts
    from splitrun.planner.what_if import with_budgets

    if question.facts is not None:
        found = read_facts_for(question.facts, question.named, None, question.kv)
        return replace(found, cluster=with_budgets(found.cluster, start, question.facts))
    if question.machine is not None:
        files = resolve(question.named, question.revision, weights=question.load == "weights")
        return Facts(profile(files), with_budgets(here, start, question.machine))
    found = gather_facts(
        question.named, start or None, question.weights, question.revision, question.load,
        tuple(sorted({1, question.sessions or 1})), report=report, kv=question.kv,
    )  # fmt: skip
    return found if start else replace(found, cluster=replace(found.cluster, devices=()))
