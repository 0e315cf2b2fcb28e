"""From what the user names, a model or a placement file, to a placement. Shared by the commands that load one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from splitrun.cli.options import is_placement
from splitrun.errors import InvalidPlacement

if TYPE_CHECKING:
    from splitrun.planner.facts import Objective
    from splitrun.planner.placement import Placement


@dataclass(frozen=True)
class Planning:
    """The planning options of a command, as given; None where they were not."""

    memory: list[str] | None
    context: int | None
    sessions: int | None
    objective: Objective
    weights: str
    revision: str | None
    load: Literal["weights", "dummy"] = "weights"
    nodes: bool = False


def plan_or_load(named: str, planning: Planning, default_sessions: int = 1) -> tuple[Placement, bool]:
    """The placement that ``named`` leads to, and whether it was planned just now.

    A file is checked against this machine and the model; the planning options are for models only. Raises
    InvalidPlacement for a file that is stale, and whatever planning raises.
    """
    import splitrun
    from splitrun import api
    from splitrun.measure.budget import parse_memory
    from splitrun.model.lean_import import import_transformers

    import_transformers()
    if is_placement(named):
        _refuse_options(named, planning)
        placement = splitrun.Placement.load(named)
        api.check(placement, named, load=planning.load)
        return placement, False
    return (
        api.plan(
            named,
            memory=parse_memory(planning.memory),
            context=planning.context,
            sessions=planning.sessions or default_sessions,
            objective=planning.objective,
            weights=planning.weights,
            revision=planning.revision,
            load=planning.load,
            nodes=planning.nodes,
        ),
        True,
    )


def _refuse_options(file: str, planning: Planning) -> None:
    given = {
        "--memory": planning.memory,
        "--context": planning.context,
        "--sessions": planning.sessions,
        "--objective": planning.objective != "latency",
        "--weights": planning.weights != "auto",
        "--revision": planning.revision,
        "--nodes": planning.nodes,
    }
    names = [name for name, value in given.items() if value]
    if names:
        raise InvalidPlacement(
            f"{' and '.join(names)} cannot change {file}, which is planned already; edit it, or name the model instead"
        )
