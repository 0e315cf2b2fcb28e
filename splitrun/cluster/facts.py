"""The planner's facts over several machines: each node's own, joined by what was measured of the way to it.

What is gathered is kept beside the other measurements, so that a plan can be made again in a moment when a node is
lost. Knows nothing of how nodes are asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from splitrun.cluster.process import machine_of
from splitrun.errors import InvalidPlacement
from splitrun.measure.cache import cache_folder
from splitrun.measure.probe import probe
from splitrun.measure.profile import profile
from splitrun.model.files import ModelFiles
from splitrun.model.structure import ModelStructure
from splitrun.planner.datasheet import CARD_PROCESS_BYTES
from splitrun.planner.facts import Cluster, Device, Link
from splitrun.planner.facts_file import Facts, read_facts, write_facts
from splitrun.planner.placement import Placement


def joined(here: Facts, others: Mapping[str, Facts], links: Mapping[tuple[str, str], Link]) -> Facts:
    """One cluster of this machine (``here``) and of nodes by name.

    ``links``: (node, node) -> what was measured between two machines, "" being this one; both directions are alike.
    A process takes as much there as here, where that was measured: the versions are the same. Every device there has a
    process of its own, so a node's processor pays for those of its cards too, with what a driver takes of main memory:
    as much as here, or as is usual.
    """
    devices = [*here.cluster.devices]
    process_bytes = max((device.context_bytes for device in devices if device.kind == "cpu"), default=0)
    driver_bytes = here.cluster.card_process_bytes + here.cluster.card_layers_bytes or CARD_PROCESS_BYTES
    seconds, factors, peaks = dict(here.profile.seconds), dict(here.profile.factors), dict(here.profile.peaks)
    known = dict(here.cluster.links)
    for node, facts in others.items():
        more = len(facts.cluster.local_cards()) * (process_bytes + driver_bytes)
        devices += [_named(device, node, process_bytes, more) for device in facts.cluster.devices]
        seconds |= {(f"{node}/{name}", form): found for (name, form), found in facts.profile.seconds.items()}
        factors |= {(f"{node}/{name}", form): found for (name, form), found in facts.profile.factors.items()}
        peaks |= {(f"{node}/{name}", form): found for (name, form), found in facts.profile.peaks.items()}
        known |= {(f"{node}/{one}", f"{node}/{two}"): link for (one, two), link in facts.cluster.links.items()}
    for source in devices:
        for target in devices:
            between = machine_of(source.name), machine_of(target.name)
            if between[0] != between[1]:
                link = links.get(between) or links.get((between[1], between[0])) or _slowest(links)
                known[source.name, target.name] = link
    cluster = replace(here.cluster, devices=tuple(devices), links=known)
    profile = replace(here.profile, seconds=seconds, factors=factors, peaks=peaks)
    return replace(here, profile=profile, cluster=cluster)


def keep(facts: Facts, folder: Path | None = None) -> None:
    """Keep the facts of a cluster for a plan that must be made in a hurry."""
    file = _file(facts.profile.fingerprint, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_facts(facts, file)


def kept_devices(fingerprint: str) -> tuple[Device, ...]:
    """The devices of the cluster as they were measured for a plan of that model."""
    kept = _kept(fingerprint)
    return () if kept is None else kept.cluster.devices


def remaining_facts(files: ModelFiles, structure: ModelStructure, placement: Placement, lost: Collection[str]) -> Facts:
    """What a new plan is made from when ``lost`` machines are gone: this machine as it is now, the other nodes as they
    were when the plan was made."""
    cluster = probe()
    facts = Facts(profile(files, structure), cluster)
    kept = _kept(files.fingerprint)
    others = [name for name in placement.device_names if machine_of(name) and machine_of(name) not in lost]
    devices = [_within(device, placement) for device in cluster.devices]
    devices += [_other(name, kept, cluster, placement) for name in others]
    links = dict(cluster.links)
    if kept is not None:
        links |= kept.cluster.links
        facts = replace(facts, profile=replace(facts.profile, seconds=kept.profile.seconds))
    return replace(facts, cluster=replace(cluster, devices=tuple(devices), links=links))


def _named(device: Device, node: str, process_bytes: int, cards_bytes: int) -> Device:
    taken = max(device.context_bytes, process_bytes) if device.kind == "cpu" else device.context_bytes
    if device.name == "cpu":
        taken += cards_bytes
    pool = f"{node}/{device.memory_pool}"
    return replace(device, name=f"{node}/{device.name}", memory_pool=pool, context_bytes=taken)


def _slowest(links: Mapping[tuple[str, str], Link]) -> Link:
    """Two nodes between which nothing was measured are taken to be as far apart as the farthest pair."""
    found: Sequence[Link] = list(links.values()) or [Link(1e-3, 10e6)]
    return Link(max(link.latency_s for link in found), min(link.bandwidth_bytes_per_s for link in found))


def _file(fingerprint: str, folder: Path | None = None) -> Path:
    return (folder or cache_folder()) / f"cluster-{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.json"


def _kept(fingerprint: str) -> Facts | None:
    file = _file(fingerprint)
    try:
        return read_facts(file) if file.is_file() else None
    except InvalidPlacement:
        return None  # of another version: bandwidths must do


def _within(device: Device, placement: Placement) -> Device:
    """A device of this machine, held to the budget that the plan gave it."""
    planned = placement.devices.get(device.name, device.budget_bytes)
    return replace(device, budget_bytes=min(planned, device.budget_bytes))


def _other(name: str, kept: Facts | None, here: Cluster, placement: Placement) -> Device:
    """A device of another node as it was measured; where it was not, one as fast as this machine's processor."""
    known = {device.name: device for device in kept.cluster.devices} if kept is not None else {}
    node = machine_of(name)
    found = known.get(name) or replace(here.devices[0], name=name, memory_pool=f"{node}/host")
    return replace(found, budget_bytes=placement.devices.get(name, found.budget_bytes))
