"""plan(): probe the machine, profile the model, solve. check(): does a placement still hold here?

The public way from a model to a placement; knows nothing of running one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from splitrun.errors import DoesNotFit, InvalidPlacement

if TYPE_CHECKING:
    from splitrun.planner.facts import Objective
    from splitrun.planner.placement import Placement

DEFAULT_CONTEXT = 4096


def plan(
    model: str,
    *,
    memory: Mapping[str, str | int] | None = None,
    context: int | None = None,
    sessions: int = 1,
    objective: Objective = "latency",
    weights: str = "auto",
    revision: str | None = None,
    load: Literal["weights", "dummy"] = "weights",
) -> Placement:
    """Decide which device computes which units of ``model``: "demo", a directory, or a Hugging Face Hub id.

    memory     device -> budget ("4GiB", bytes, or "auto"): the devices to use; None: every device, with what is free
    context    tokens per sequence, prompt and answer; None: 4096, or what the model knows if that is less
    sessions   sequences that must fit at once
    objective  "latency", "throughput" or "first-token"
    weights    a weight format, or "auto" for the most precise that fits
    load       "dummy": the directory need not hold weights, because the engine will make random ones

    Loads nothing. Raises DoesNotFit with the shortfall per device, InvalidPlacement for devices or sizes that cannot
    be, and a ModelError for a model that cannot be run.
    """
    from splitrun.measure.probe import probe
    from splitrun.measure.profile import profile
    from splitrun.model.files import resolve
    from splitrun.planner.facts import Workload
    from splitrun.planner.solve import solve

    for name, value in (("context", context), ("sessions", sessions)):
        if value is not None and value < 1:
            raise InvalidPlacement(f"{name} is {value}: it must be at least 1")
    cluster = probe(memory)
    facts = profile(resolve(model, revision, weights=load == "weights"))
    wanted = min(DEFAULT_CONTEXT, facts.max_context) if context is None else context
    workload = Workload(context=wanted, sessions=sessions, objective=objective)
    try:
        return solve(facts, cluster, workload, weights)
    except DoesNotFit as error:
        if memory is None or any(name.startswith("cpu") for name in memory):
            raise
        raise DoesNotFit(
            f"{error}; main memory is not used: name cpu in --memory too", error.shortfall_bytes
        ) from error


def check(placement: Placement, file: str = "FILE", *, load: Literal["weights", "dummy"] = "weights") -> None:
    """Raise InvalidPlacement when the placement no longer suits the model or this machine, naming what mends it.

    ``file`` is the placement's, for the message. With ``load`` "dummy" the model's fingerprint does not matter.
    """
    from splitrun.measure.probe import cluster_of, survey, this_machine
    from splitrun.model.files import resolve
    from splitrun.planner.check import stale_reasons

    files = resolve(placement.model.source, placement.model.revision, weights=load == "weights")
    machine = this_machine()
    found = survey(machine)
    here = {"cpu", *(item.name for item in found.accelerators if item.fault is None)}
    used = [name for name in placement.device_names if name in here or name.startswith("cpu:")]
    cluster = cluster_of(found, machine, dict.fromkeys(used, "auto") or None)
    layers = int(files.config.get_text_config(decoder=True).num_hidden_layers)
    reasons = stale_reasons(placement, files.fingerprint if load == "weights" else None, layers, cluster, file)
    if reasons:
        raise InvalidPlacement(f"{file}: {reasons[0]}")
