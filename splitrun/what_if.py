"""Answer what-if questions: this machine (or one from a data sheet, or from a facts file), changed, then planned for.

Beside ``api.py``, which plans for what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from splitrun.errors import InvalidPlacement

if TYPE_CHECKING:
    from splitrun.planner.facts import Cluster, Objective, Workload
    from splitrun.planner.facts_file import Facts
    from splitrun.planner.placement import Placement
    from splitrun.planner.what_if import Changes


@dataclass(frozen=True)
class Question:
    """What the user asks; ``named`` is a model or a placement file. ``context`` and ``sessions`` None are the
    placement's, or 4096 and 1; so is "latency" the placement's objective."""

    named: str
    changes: Changes
    machine: str | None = None
    facts: str | None = None
    memory: Mapping[str, str | int] | None = None
    context: int | None = None
    sessions: int | None = None
    objective: Objective = "latency"
    weights: str = "auto"
    quality: str = "nf4"
    kv: Literal["auto", "int8"] = "auto"
    revision: str | None = None
    load: Literal["weights", "dummy"] = "weights"


def answer(question: Question, report: Callable[[str], None] = lambda text: None) -> Placement:
    """The best placement on the changed machine. Raises as planning does, and InvalidPlacement for unknown names."""
    from splitrun.api import DEFAULT_CONTEXT
    from splitrun.model.files import named_in
    from splitrun.planner.facts import Workload
    from splitrun.planner.solve import solve
    from splitrun.planner.what_if import changed

    if question.machine and question.facts:
        raise InvalidPlacement("--machine and --facts both say where to start; give one of them")
    file, (question, workload) = question.named, _of_placement(question)
    with named_in(file) if workload else nullcontext():
        found = _start(question, report)
    cluster, notes = changed(found.cluster, question.changes)
    cluster = cluster.keeping(question.kv)
    context = min(DEFAULT_CONTEXT, found.profile.max_context)
    workload = workload or Workload(context=context)
    workload = replace(
        workload, context=question.context or workload.context, sessions=question.sessions or workload.sessions
    )
    if question.objective != "latency":
        workload = replace(workload, objective=question.objective)
    plan = solve(found.profile, cluster, workload, question.weights, question.quality, stream=True)
    if plan.estimate is None or not notes:
        return plan
    return replace(plan, estimate=replace(plan.estimate, notes=(*plan.estimate.notes, *notes)))


def _of_placement(question: Question) -> tuple[Question, Workload | None]:
    """The question about a placement's model, with the placement's workload."""
    if not question.named.endswith((".yaml", ".yml")):
        return question, None
    from splitrun.planner.placement import Placement

    placement = Placement.load(question.named)
    return replace(question, named=placement.model.source, revision=placement.model.revision), placement.workload


def _refuse_names(cluster: Cluster, changes: Changes) -> None:
    """Raise InvalidPlacement for names that are not known, before anything is timed."""
    from splitrun.planner.what_if import changed

    changed(cluster, changes)


def _start(question: Question, report: Callable[[str], None]) -> Facts:
    """The facts before the changes."""
    from splitrun.api import gather_facts, read_facts_for
    from splitrun.measure.profile import profile
    from splitrun.model.files import resolve
    from splitrun.planner.facts_file import Facts
    from splitrun.planner.what_if import machine_of, with_budgets

    if question.facts is not None:
        return read_facts_for(question.facts, question.named, question.memory)
    if question.machine is None:
        return gather_facts(
            question.named, question.memory, question.weights, question.revision, question.load, (1,), report=report,
            check=lambda profile, cluster: _refuse_names(cluster, question.changes),
        )  # fmt: skip
    cluster = machine_of(question.machine)
    if question.memory is not None:
        cluster = with_budgets(cluster, question.memory, question.machine)
    return Facts(profile(resolve(question.named, question.revision, weights=question.load == "weights")), cluster)
