"""plan(): probe the machine, profile the model, solve. check(): does a placement still hold here?

The public way from a model to a placement; knows nothing of running one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Literal

from splitrun.errors import DoesNotFit, InvalidPlacement
from splitrun.kernels.cpu.settings import check_settings

if TYPE_CHECKING:
    from splitrun.measure.cache import Cache
    from splitrun.measure.engine_cost import EngineCost
    from splitrun.model.files import ModelFiles
    from splitrun.planner.estimate import Estimate
    from splitrun.planner.facts import Cluster, ModelProfile, Objective, Workload
    from splitrun.planner.facts_file import Facts
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
    quality: str = "nf4",
    kv: Literal["auto", "int8"] = "auto",
    facts: str | os.PathLike[str] | None = None,
    refresh: bool = False,
    nodes: bool = False,
    report: Callable[[str], None] = lambda text: None,
) -> Placement:
    """Decide which device computes which units of ``model``: "demo", a directory, or a Hugging Face Hub id.

    memory     device -> budget ("4GiB", bytes, or "auto"): the devices to use; None: every device, with what is free
    context    tokens per sequence, prompt and answer; None: 4096, or what the model knows if that is less
    sessions   sequences that must fit at once
    objective  "latency", "throughput" or "first-token"
    weights    a weight format, or "auto" for the fastest mix of formats within ``quality``
    load       "dummy": the directory need not hold weights, because the engine will make random ones
    quality    the most that weights may lose under "auto": as much as all-"nf4", all-"int8", … or a share of nf4's loss
    kv         "int8": K and V on processors take half the memory of 16 bits; "auto": in the type that is computed in
    facts      a file that ``splitrun profile --facts`` wrote: plan for the machine described there
    refresh    measure again what earlier runs measured
    nodes      also over the other machines of the cluster (``splitrun node``); ``memory`` may then name NODE/cpu
    report     is told what is being measured, which takes up to a minute the first time

    Loads nothing but single units, to time them. Raises DoesNotFit with the shortfall per device, InvalidPlacement for
    devices or sizes that cannot be, InvalidRequest for a setting of the environment that names nothing, and a
    ModelError for a model that cannot be run.
    """
    from splitrun.planner.solve import check_kv, solve

    check_settings()
    _check_arguments(context, sessions, weights, quality, nodes and facts is not None)
    rows = tuple(sorted({1, sessions}))

    asked = partial(_workload, context, sessions, objective)
    check, refuse = refusals(asked, weights, kv)
    try:
        if facts is not None:
            known = read_facts_for(facts, model, memory, kv)
        elif nodes:
            known = gather_cluster(model, memory, weights, revision, load, rows, refresh, report, kv)
        else:
            known = gather_facts(model, memory, weights, revision, load, rows, refresh, report, kv, check, refuse)
        check_kv(known.cluster, kv)
        return solve(known.profile, known.cluster.keeping(kv), asked(known.profile), weights, quality, stream=True)
    except DoesNotFit as error:
        raise with_unused(error, memory) from error


def refusals(
    asked: Callable[[ModelProfile], Workload],
    weights: str,
    kv: str,
    planned: Callable[[Cluster], Cluster] = lambda cluster: cluster,
) -> tuple[Callable[[ModelProfile, Cluster], None], Callable[[ModelProfile, Cluster], None]]:
    """``check`` and ``refuse`` for ``gather_facts``, of a plan for what is ``asked`` of a model over the cluster that
    ``planned`` makes of the one that is measured."""
    from splitrun.planner.formats import allowed_formats
    from splitrun.planner.refuse import refuse_hopeless
    from splitrun.planner.solve import check_kv, check_request

    def check(profile: ModelProfile, cluster: Cluster) -> None:
        check_kv(planned(cluster), kv)
        check_request(profile, planned(cluster), asked(profile))

    def refuse(profile: ModelProfile, cluster: Cluster) -> None:
        refuse_hopeless(profile, planned(cluster), asked(profile), allowed_formats(profile, weights))

    return check, refuse


def _workload(context: int | None, sessions: int, objective: Objective, profile: ModelProfile) -> Workload:
    """What is asked of the model; without a context, as much as it knows up to the usual one."""
    from splitrun.planner.facts import Workload

    wanted = min(DEFAULT_CONTEXT, profile.max_context) if context is None else context
    return Workload(context=wanted, sessions=sessions, objective=objective)


def _check_arguments(context: int | None, sessions: int, weights: str, quality: str, twice: bool) -> None:
    """Raises InvalidPlacement for sizes and flags that cannot be. ``twice``: both the machines that are here and a file
    of facts are to be planned for."""
    from splitrun.planner.quality import check_quality

    for name, value in (("context", context), ("sessions", sessions)):
        if value is not None and value < 1:
            raise InvalidPlacement(f"{name} is {value}: it must be at least 1")
    if twice:
        raise InvalidPlacement("--nodes measures machines that are here and --facts describes one; give one of them")
    check_quality(weights, quality)


def with_unused(error: DoesNotFit, memory: Mapping[str, str | int] | None) -> DoesNotFit:
    """The error, saying also that main memory is not used where that is so."""
    if memory is None or any(name.startswith("cpu") for name in memory):
        return error
    return DoesNotFit(f"{error}; main memory is not used: name cpu in --memory too", error.shortfall_bytes)


def gather_facts(
    model: str,
    memory: Mapping[str, str | int] | None = None,
    weights: str = "auto",
    revision: str | None = None,
    load: Literal["weights", "dummy"] = "weights",
    rows: tuple[int, ...] = (1, 4, 16),
    refresh: bool = False,
    report: Callable[[str], None] = lambda text: None,
    kv: str = "auto",
    check: Callable[[ModelProfile, Cluster], None] = lambda profile, cluster: None,
    refuse: Callable[[ModelProfile, Cluster], None] = lambda profile, cluster: None,
) -> Facts:
    """Profile ``model`` and time its units on this machine; arguments and errors as for ``plan``.

    ``check`` and ``refuse`` see bytes and budgets before anything, and before any unit, is timed, and may raise.
    """
    from splitrun.engine.own_seconds import engine_cost
    from splitrun.measure.gather import gather
    from splitrun.planner.formats import device_formats

    def formats(profile: ModelProfile, cluster: Cluster) -> Mapping[str, tuple[str, ...]]:
        return device_formats(profile, cluster, weights)

    return gather(
        model, revision, load, memory, formats, rows, engine_cost,
        refresh=refresh, kv=kv, report=report, check=check, refuse=refuse,
    )  # fmt: skip


def gather_cluster(
    model: str,
    memory: Mapping[str, str | int] | None,
    weights: str,
    revision: str | None,
    load: Literal["weights", "dummy"],
    rows: tuple[int, ...],
    refresh: bool,
    report: Callable[[str], None],
    kv: str = "auto",
) -> Facts:
    """The facts of this machine and of every other node; arguments and errors as for ``plan``."""
    from splitrun.cluster.survey import split_memory, survey_nodes
    from splitrun.model.files import resolve

    here, there = split_memory(memory)
    known = gather_facts(model, here, weights, revision, load, rows, refresh, report, kv=kv)
    files = resolve(model, revision, weights=load == "weights")
    return survey_nodes(known, files, there, weights, rows, refresh=refresh, kv=kv, report=report)


def read_facts_for(
    file: str | os.PathLike[str], model: str, memory: Mapping[str, str | int] | None, kv: str = "auto"
) -> Facts:
    """The facts in ``file``, with the budgets that ``memory`` names. Raises InvalidPlacement when they do not suit."""
    from splitrun.planner.facts_file import read_facts
    from splitrun.planner.what_if import with_budgets

    found = read_facts(Path(file))
    if found.profile.source != model:
        raise InvalidPlacement(
            f"{file} describes {found.profile.source}, not {model}; make it again with: "
            f"splitrun profile {quote(model)} --facts {quote(str(file))}"
        )
    timed = {name for name, _ in found.profile.seconds}
    kept = {device.kv_dtype for device in found.cluster.devices if device.kind == "cpu" and device.name in timed}
    wanted, option = ("int8", " --kv int8") if kv == "int8" else (None, "")
    if kept - {wanted}:
        types = "int8, which --kv int8 plans with" if wanted is None else "16 bits"
        raise InvalidPlacement(
            f"{file} was measured with keys and values in {types}; for others make it again with: "
            f"splitrun profile {quote(model)}{option} --facts {quote(str(file))}"
        )
    return found if memory is None else replace(found, cluster=with_budgets(found.cluster, memory, str(file)))


def predict(
    placement: Placement, prompt_tokens: int, new_tokens: int, load: Literal["weights", "dummy"] = "weights"
) -> Estimate:
    """What the placement will do on this machine with a prompt and an answer of those lengths, one session alone and
    one request right behind the other, as they are in a bench.

    Times the units of the placement's formats on its devices, unless an earlier run did.
    """
    from splitrun.engine.own_seconds import engine_cost
    from splitrun.measure.gather import gather
    from splitrun.planner.cost import estimate

    formats: dict[str, tuple[str, ...]] = {}
    for stage in placement.stages:
        formats[stage.device] = tuple({*formats.get(stage.device, ()), stage.weights})
    budgets: dict[str, str | int] = {name: placement.devices.get(name, "auto") for name in placement.device_names}
    source, revision = placement.model.source, placement.model.revision

    def in_a_row(kept: Cache, card: str | None = None) -> EngineCost:
        cost = engine_cost(kept, card)
        return replace(cost, request_s=cost.next_request_s)

    threads = {stage.device: stage.threads for stage in placement.stages if stage.threads != "auto"}
    known = gather(
        source,
        revision,
        load,
        budgets,
        lambda profile, cluster: formats,
        (1,),
        in_a_row,
        kv=placement.kv,
        threads=threads,
    )
    history = prompt_tokens + new_tokens // 2
    workload = replace(placement.workload, history_tokens=history, prompt_tokens=prompt_tokens)
    return estimate(known.profile, known.cluster, replace(placement, workload=workload))


def hashed(placement: Placement) -> Placement:
    """The placement with a hash of every weight file in its fingerprint, for ``check``. Reads the files."""
    from splitrun.model.files import resolve
    from splitrun.model.payload import with_payload

    files = resolve(placement.model.source, placement.model.revision)
    return replace(placement, model=replace(placement.model, fingerprint=with_payload(files.fingerprint, files.path)))


def check(
    placement: Placement,
    file: str = "FILE",
    *,
    load: Literal["weights", "dummy"] = "weights",
    verify: bool = False,
) -> None:
    """Raise InvalidPlacement when the placement no longer suits the model or this machine, naming what mends it.

    ``file`` is the placement's, for the message. With ``load`` "dummy" the model's fingerprint does not matter.
    ``verify`` reads all weights and raises CorruptWeights when they are not those that ``hashed`` saw.
    """
    from splitrun.cluster.process import local_device, machine_of
    from splitrun.cluster.survey import node_devices
    from splitrun.measure.host import logical_processors
    from splitrun.measure.probe import cluster_of, survey, this_machine
    from splitrun.measure.profile import max_context
    from splitrun.model.files import named_in, resolve
    from splitrun.model.payload import headers_of
    from splitrun.model.payload import verify as verify_payload
    from splitrun.planner.check import stale_reasons

    with named_in(file):
        files = resolve(placement.model.source, placement.model.revision, weights=load == "weights")
    machine = this_machine()
    found = survey(machine, compute=False)
    here = {"cpu", *(item.name for item in found.accelerators if item.fault is None)}
    local = {name: local_device(name) for name in placement.device_names}
    used = [device for device in local.values() if device in here or device.startswith("cpu:")]
    cluster = cluster_of(found, machine, dict.fromkeys(used, "auto") or None)
    in_processes = [
        replace(cluster.device(device), name=name)
        for name, device in local.items()
        if name != device and device in used
    ]
    on_nodes = node_devices(placement, files.fingerprint) if any(map(machine_of, placement.device_names)) else []
    cluster = replace(cluster, devices=(*cluster.devices, *in_processes, *on_nodes))
    layers = int(files.config.get_text_config(decoder=True).num_hidden_layers)
    fingerprint = files.fingerprint if load == "weights" else None
    bare = replace(placement, model=replace(placement.model, fingerprint=headers_of(placement.model.fingerprint)))
    least: dict[str, int] = {}
    if placement.estimate is None and placement.devices and placement.layers == layers:
        least = _least_bytes(placement, files, cluster)
    reasons = stale_reasons(
        bare, fingerprint, layers, cluster, file, max_context(files.config), logical_processors(), least
    )
    if reasons:
        raise InvalidPlacement(f"{file}: {reasons[0]}")
    if verify:
        command = f"splitrun plan {quote(placement.model.source)} --hash -o {quote(file)}"
        verify_payload(placement.model.fingerprint, files.path, command)


def _least_bytes(placement: Placement, files: ModelFiles, cluster: Cluster) -> dict[str, int]:
    """Device -> bytes that a placement takes there at least: weights, KV, and the process or the card's context.
    Nothing where the model is not stored as the placement asks, or a device is not there, which others tell."""
    from splitrun.engine.own_seconds import engine_cost
    from splitrun.measure.engine_cost import with_engine
    from splitrun.measure.probe import this_machine
    from splitrun.measure.profile import profile
    from splitrun.planner.memory import placement_memory

    facts, here = profile(files), {device.name for device in cluster.devices}
    known = all(stage.weights in unit.weight_bytes for stage in placement.stages for unit in facts.units)
    if not known or not set(placement.device_names) <= here:
        return {}
    card = next((name for name in placement.device_names if name in cluster.local_cards()), None)
    paid = with_engine(cluster, engine_cost(this_machine().cache, card))
    bills = placement_memory(facts, paid, placement)
    return {bill.device: bill.expected_bytes - bill.workspace_bytes for bill in bills}
