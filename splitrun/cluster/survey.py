"""Facts over all nodes of the cluster: each measures itself, and the ways between them are measured.

Knows the nodes and the planner's facts, nothing of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from splitrun.cluster.facts import joined, keep, kept_devices
from splitrun.cluster.home import Home
from splitrun.cluster.keeper import ORPHAN_S
from splitrun.cluster.links import Links
from splitrun.cluster.model_here import Provider
from splitrun.cluster.nodes import Membership, NodeProcess, Nodes
from splitrun.cluster.process import machine_of
from splitrun.errors import ClusterError, InvalidPlacement, SplitrunError
from splitrun.model.files import ModelFiles
from splitrun.planner.facts import Device
from splitrun.planner.facts_file import Facts, build
from splitrun.planner.placement import Placement

MODULE = "splitrun.cluster.node_survey"
SURVEY_S = 60.0
"""Silence after which a node's measuring is given up."""
_KINDS: Mapping[str, Literal["cpu", "cuda", "xpu", "mps"]] = {
    "cpu": "cpu", "cuda": "cuda", "xpu": "xpu", "mps": "mps"
}  # fmt: skip
Budgets = Mapping[str, str | int]


def split_memory(memory: Budgets | None) -> tuple[Budgets | None, dict[str, dict[str, str | int]]]:
    """What ``--memory`` says of this machine, and of each node it names; None: nothing, so everything."""
    if memory is None:
        return None, {}
    here: dict[str, str | int] = {}
    there: dict[str, dict[str, str | int]] = {}
    for name, size in memory.items():
        node, _, device = name.rpartition("/")
        if node:
            there.setdefault(node, {})[device] = size
        else:
            here[name] = size
    if not here:
        raise InvalidPlacement("--memory names no device of this machine, which takes part: name cpu too")
    return here, there


def survey_nodes(
    here: Facts,
    files: ModelFiles,
    memory: Mapping[str, Budgets],
    formats: str,
    rows: tuple[int, ...],
    *,
    refresh: bool = False,
    kv: str = "auto",
    report: Callable[[str], None] = lambda text: None,
) -> Facts:
    """``here`` joined with the facts of every living node, or of those that ``memory`` names.

    A node that cannot be measured is left out, and ``report`` told why. Raises ClusterError without a cluster,
    InvalidPlacement for a node that is not there.
    """
    nodes = Nodes()
    known = [node for node in nodes.all() if node.name != nodes.own.name]
    for node in known:
        if node.silent:
            report(f"{node.name} was left out: it {node.trouble}")
    others = [node for node in known if node.alive]
    for name in memory:
        if name not in {node.name for node in others}:
            raise InvalidPlacement(
                f"--memory names node {name}, which is not there: 'splitrun node list' shows which are"
            )
    if memory:
        others = [node for node in others if node.name in memory]
    if not others:
        report("no other node is there: planning for this machine alone")
        return here
    provider = Provider(files)
    processes: dict[str, NodeProcess] = {}
    found: dict[str, Facts] = {}
    try:
        for node in others:
            job = {"node": node.name, "model": provider.job(), "memory": memory.get(node.name), "formats": formats,
                   "rows": rows, "refresh": refresh, "kv": kv, "orphan_s": ORPHAN_S}  # fmt: skip
            try:
                processes[node.name] = nodes.start(f"{node.name}/cpu", job, MODULE, provider)
            except SplitrunError as error:
                report(f"{node.name} was left out: {error}")
        for name, process in processes.items():
            report(f"measuring {name}")
            try:
                found[name] = _facts_of(process.expect("facts", SURVEY_S), name)
            except SplitrunError as error:
                report(f"{name} was left out: {error}")
    finally:
        for process in processes.values():
            process.end_quietly()
    report("measuring the ways between the nodes")
    with Links(nodes, [node for node in others if node.name in found]) as links:
        ways = links.all()
        for name, fault in links.faults.items():
            report(f"{name} was left out: {fault}")
            found.pop(name, None)
    facts = joined(here, found, ways)
    keep(facts)
    return facts


def node_devices(placement: Placement, fingerprint: str) -> list[Device]:
    """The devices of other nodes that a placement names, as they were measured last; none for a node that is gone, nor
    where there is no cluster."""
    try:
        living = {node.name: node for node in Membership(Home.default()).all() if node.alive}
    except ClusterError:
        return []
    known = {device.name: device for device in kept_devices(fingerprint)}
    found = []
    for name in placement.device_names:
        node = living.get(machine_of(name))
        if node is not None:
            found.append(known.get(name) or _unmeasured(name, int(node.note["memory_bytes"])))
    return found


def _unmeasured(name: str, memory_bytes: int) -> Device:
    """A device of a node that nobody has measured: whether it is there and has room is seen when it loads."""
    kind = name.rpartition("/")[2].partition(":")[0]
    return Device(
        name, _KINDS[kind], name, memory_bytes, memory_bytes, memory_bytes, name, 0, 1e9, 1e9, 1e-3, "bf16"
    )  # fmt: skip


def _facts_of(data: Any, name: str) -> Facts:
    try:
        facts: Facts = build(Facts, data, "")
        return facts
    except ValueError as error:
        raise InvalidPlacement(f"the facts of {name} cannot be read: {error}") from error
