"""Gather the facts of a plan on this machine: probe the devices, profile the model, time its units.

Joins what the other modules of this package measure; knows nothing of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from splitrun import __version__
from splitrun.measure.handover import step_seconds
from splitrun.measure.probe import probe, this_machine
from splitrun.measure.profile import profile
from splitrun.measure.unit_seconds import Report, Wanted, measure
from splitrun.model.files import resolve
from splitrun.model.structure import inspect
from splitrun.planner.facts import Cluster, ModelProfile
from splitrun.planner.facts_file import Facts

Formats = Callable[[ModelProfile, Cluster], Mapping[str, Sequence[str]]]


def gather(
    model: str,
    revision: str | None,
    load: Literal["weights", "dummy"],
    memory: Mapping[str, str | int] | None,
    formats: Formats,
    rows: tuple[int, ...],
    *,
    refresh: bool = False,
    report: Report = lambda text: None,
) -> Facts:
    """Everything that a plan of ``model`` on this machine is made from.

    ``formats`` says which weight formats to time on each device, ``rows`` how many sequences decode together.
    ``refresh`` measures again what earlier runs measured. Raises as probing and profiling do.
    """
    machine = this_machine(refresh)
    cluster = probe(memory, machine)
    files = resolve(model, revision, weights=load == "weights")
    structure = inspect(files.config)
    facts = profile(files, structure)
    wanted = Wanted(formats(facts, cluster), rows)
    timed = measure(files, structure, facts, cluster, wanted, machine.cache, report)
    return Facts(timed, replace(cluster, step_s=step_seconds(machine.cache)), __version__)
