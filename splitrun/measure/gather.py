"""Gather the facts of a plan on this machine: probe the devices, profile the model, time its units.

Joins what the other modules of this package measure; knows nothing of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from splitrun import __version__
from splitrun.measure.cache import Cache
from splitrun.measure.calibration import calibrated, forget
from splitrun.measure.engine_cost import EngineCost, with_engine
from splitrun.measure.probe import probe, this_machine
from splitrun.measure.profile import profile
from splitrun.measure.unit_seconds import Report, Wanted, measure
from splitrun.model.files import resolve
from splitrun.model.structure import inspect
from splitrun.planner.facts import FORMATS, Cluster, ModelProfile
from splitrun.planner.facts_file import Facts

Formats = Callable[[ModelProfile, Cluster], Mapping[str, Sequence[str]]]


Check = Callable[[ModelProfile, Cluster], None]
MeasureEngine = Callable[[Cache, str | None], EngineCost]
"""(what is kept, a card in use) -> what the engine takes."""


def gather(
    model: str,
    revision: str | None,
    load: Literal["weights", "dummy"],
    memory: Mapping[str, str | int] | None,
    formats: Formats,
    rows: tuple[int, ...],
    engine: MeasureEngine | None = None,
    *,
    refresh: bool = False,
    kv: str = "auto",
    threads: Mapping[str, int] | None = None,
    report: Report = lambda text: None,
    check: Check = lambda profile, cluster: None,
    refuse: Check = lambda profile, cluster: None,
) -> Facts:
    """Everything that a plan of ``model`` on this machine is made from.

    ``formats`` says which weight formats to time on each device, ``rows`` how many sequences decode together.
    ``engine`` says what the engine itself takes; a machine that only lends its devices leaves that out. ``refresh``
    measures again what earlier runs measured. With ``kv`` "int8" the units of processors are timed with K and V in
    int8; ``threads`` are those of processors that are to have so many. ``check`` raises where what is asked contradicts
    the model, before anything is measured; ``refuse`` where the budgets are hopeless, what the engine takes of them
    counted, before any unit is timed. Raises as they, probing and profiling do.
    """
    machine = this_machine(refresh)
    cluster = probe(memory, machine).keeping(kv)
    files = resolve(model, revision, weights=load == "weights")
    structure = inspect(files.config)
    facts = profile(files, structure)
    wanted = Wanted(formats(facts, cluster), rows, threads=threads or {})
    card = next((device.name for device in cluster.devices if device.kind == "cuda"), None)
    check(facts, cluster)
    if engine is not None:
        cluster = with_engine(cluster, engine(machine.cache, card))
    refuse(facts, cluster)
    if refresh:
        forget(machine.cache, facts.fingerprint, cluster.devices, FORMATS)
    timed = measure(files, structure, facts, cluster, wanted, machine.cache, report)
    timed = calibrated(timed, cluster, machine.cache)
    return Facts(timed, cluster, __version__)
