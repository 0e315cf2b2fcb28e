"""Probe: this machine's devices, memory, budgets, speeds and links, as the planner's facts.

``survey`` asks what is there, ``probe`` makes a `Cluster` of it. Where the facts come from is a `Machine`, so that
tests describe machines that they do not run on. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from splitrun.measure import speed
from splitrun.measure.accelerators import Accelerator, list_accelerators
from splitrun.measure.budget import VIRTUAL_CPU, default_budget_bytes, named_budgets
from splitrun.measure.cache import Cache, Figures, cache_folder
from splitrun.measure.context import DriverFree, card_memory, nvml_free
from splitrun.measure.host import (
    HostMemory,
    Processor,
    ReadFile,
    allowed_processors,
    read_file,
    read_host_memory,
    read_processor,
)
from splitrun.measure.versions import driver_version
from splitrun.planner.datasheet import unit_overhead_s
from splitrun.planner.facts import Cluster, Device, Link

HOST_POOL = "host"
UNMEASURED_SPEED = speed.Speed(bandwidth_bytes_per_s=50e9, flops_per_s=1e12)
UNMEASURED_LINK = Link(latency_s=20e-6, bandwidth_bytes_per_s=3e9)
"""Of a card that has no memory left to measure in: the figures of a modest one."""


@dataclass(frozen=True)
class Machine:
    """Where the facts come from: files, torch, the driver, stop-watches, and what earlier runs measured."""

    torch: Any
    cache: Cache
    read: ReadFile = read_file
    allowed: Callable[[], frozenset[int]] = allowed_processors
    driver_free: DriverFree = nvml_free
    host_speed: Callable[[Any, int, int], speed.Speed] = speed.host_speed
    device_speed: Callable[[Any, str, str, str, int], speed.Speed] = speed.device_speed
    host_link: Callable[[Any, str, str, bool], Link] = speed.host_link


@dataclass(frozen=True)
class Survey:
    """What is there. ``contexts`` are the measured context bytes of the accelerators that can be used."""

    processor: Processor
    memory: HostMemory
    accelerators: tuple[Accelerator, ...]
    contexts: Mapping[str, int] = field(default_factory=dict)


def this_machine(refresh: bool = False) -> Machine:
    """The machine at hand. ``refresh``: measure again what earlier runs measured.

    One per process: a card's context can be measured before it exists only, and is remembered from then on.
    """
    return _machine(refresh)  # however the flag was given: two would not see what each other keeps


@cache
def _machine(refresh: bool) -> Machine:
    import torch

    return Machine(torch=torch, cache=Cache(cache_folder(), refresh))


def probe(
    memory: Mapping[str, str | int] | None = None, machine: Machine | None = None, compute: bool = True
) -> Cluster:
    """The devices of this machine with their budgets; see ``budget.py`` for what ``memory`` may say, ``survey`` for
    ``compute``.

    Raises InvalidPlacement when ``memory`` names a device that is not there, or more than it has.
    """
    machine = machine or this_machine()
    return cluster_of(survey(machine, compute), machine, memory)


def cluster_of(found: Survey, machine: Machine, memory: Mapping[str, str | int] | None = None) -> Cluster:
    """The surveyed devices with budgets and speeds; raises as ``probe``."""
    usable = {item.name: item for item in found.accelerators if item.fault is None}
    totals = {"cpu": found.memory.total_bytes} | {name: item.total_bytes for name, item in usable.items()}
    defaults = {"cpu": default_budget_bytes(found.memory.free_bytes, host=True)}
    defaults |= {name: default_budget_bytes(item.free_bytes, item.integrated) for name, item in usable.items()}
    budgets = defaults if memory is None else named_budgets(memory, totals, defaults)
    devices: list[Device] = []
    links: dict[tuple[str, str], Link] = {}
    for name, budget in budgets.items():
        if name in usable:
            devices.append(_accelerator_device(machine, found, usable[name], budget))
            links |= _links(machine, usable[name], [other for other in budgets if other not in usable])
        else:
            devices.append(_cpu_device(machine, found, name, budget))
    return Cluster(tuple(devices), links)


def survey(machine: Machine, compute: bool = True) -> Survey:
    """Describe the machine. Creates the context of every card that can be used, and measures it; without ``compute``,
    only where no earlier run has."""
    processor, memory = read_processor(machine.read, machine.allowed()), read_host_memory(machine.read)
    contexts: dict[str, int] = {}
    accelerators = []
    for found in list_accelerators(machine.torch):
        item = found
        if item.fault is None and item.kind == "cuda":
            item, contexts[item.name] = _with_context(machine, item, compute)
        if item.integrated:
            item = replace(item, free_bytes=min(item.free_bytes, memory.free_bytes))
        accelerators.append(item)
    return Survey(processor, memory, tuple(accelerators), contexts)


def _with_context(machine: Machine, item: Accelerator, compute: bool) -> tuple[Accelerator, int]:
    key = f"context {_conditions(machine, item)}"
    kept = machine.cache.get(key)
    known = int(kept["context_bytes"]) if kept and "context_bytes" in kept else None
    try:
        memory = card_memory(machine.torch, int(item.name.partition(":")[2]), machine.driver_free, known, compute)
    except RuntimeError as error:
        reason = str(error).split("\n", 1)[0][:200]
        return replace(item, fault=f"{item.name} failed its first computation: {reason}"), 0
    if memory.measured:
        machine.cache.put(key, {"context_bytes": memory.context_bytes})
    return replace(item, free_bytes=memory.free_bytes), memory.context_bytes


def _conditions(machine: Machine, item: Accelerator) -> str:
    version = machine.torch.version
    runtime = getattr(version, "cuda", None) or getattr(version, "hip", None) or getattr(version, "xpu", None) or ""
    driver = driver_version() if item.kind == "cuda" else None
    below = f"torch {machine.torch.__version__} {runtime} driver {driver or 'unknown'}"
    return f"{item.description} {item.identity} {below}".strip()


def _cpu_device(machine: Machine, found: Survey, name: str, budget: int) -> Device:
    processor, memory = found.processor, found.memory
    figures = machine.cache.get_or_measure(
        f"host {processor.name} {processor.cores} cores torch {machine.torch.__version__}",
        ("bandwidth_bytes_per_s", "flops_per_s"),
        lambda: vars(machine.host_speed(machine.torch, processor.cores, memory.free_bytes)),
    )
    return Device(
        name=name,
        kind="cpu",
        description=f"{processor.name}, {processor.cores} core{'s' * (processor.cores != 1)}",
        total_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes,
        budget_bytes=budget,
        memory_pool=name if VIRTUAL_CPU.fullmatch(name) else HOST_POOL,
        context_bytes=0,
        unit_overhead_s=unit_overhead_s("cpu"),
        compute_dtype="bf16",
        bandwidth_bytes_per_s=figures["bandwidth_bytes_per_s"],
        flops_per_s=figures["flops_per_s"],
    )


def _accelerator_device(machine: Machine, found: Survey, item: Accelerator, budget: int) -> Device:
    figures = _device_figures(machine, item)
    return Device(
        name=item.name,
        kind=item.kind,
        description=item.description,
        total_bytes=item.total_bytes,
        free_bytes=item.free_bytes,
        budget_bytes=budget,
        memory_pool=HOST_POOL if item.integrated else item.name,
        context_bytes=found.contexts.get(item.name, 0),
        unit_overhead_s=unit_overhead_s(item.kind, item.compute_capability),
        compute_dtype=item.half_type,
        compute_capability=item.compute_capability,
        bandwidth_bytes_per_s=figures["bandwidth_bytes_per_s"],
        flops_per_s=figures["flops_per_s"],
    )


def _device_figures(machine: Machine, item: Accelerator) -> Figures:
    arguments = (machine.torch, item.kind, item.name, item.half_type, item.free_bytes)
    try:
        return machine.cache.get_or_measure(
            f"device {_conditions(machine, item)}",
            ("bandwidth_bytes_per_s", "flops_per_s"),
            lambda: vars(machine.device_speed(*arguments)),
        )
    except RuntimeError:  # no memory for it, because others hold the card: there is then no room for a stage either
        return vars(UNMEASURED_SPEED)


def _links(machine: Machine, item: Accelerator, hosts: list[str]) -> dict[tuple[str, str], Link]:
    """Links between a card and every CPU device: the same wires whichever worker uses them."""
    inward, outward = _link(machine, item, to_device=True), _link(machine, item, to_device=False)
    return {(host, item.name): inward for host in hosts} | {(item.name, host): outward for host in hosts}


def _link(machine: Machine, item: Accelerator, to_device: bool) -> Link:
    try:
        figures = machine.cache.get_or_measure(
            f"link {'to' if to_device else 'from'} {_conditions(machine, item)}",
            ("latency_s", "bandwidth_bytes_per_s"),
            lambda: vars(machine.host_link(machine.torch, item.kind, item.name, to_device)),
        )
    except RuntimeError:
        return UNMEASURED_LINK
    return Link(figures["latency_s"], figures["bandwidth_bytes_per_s"])
