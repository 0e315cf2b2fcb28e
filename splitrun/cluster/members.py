"""Who is in the cluster: what each node left at the head, and whether it can be reached now.

Knows nothing of stages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from splitrun.cluster.ports import COUNT, answers
from splitrun.cluster.runtime import Registry


@dataclass(frozen=True)
class NodeInfo:
    """One node. ``note`` is what it says of itself: host, port, cores, versions. ``alive``: it can be used from here;
    ``silent``: the cluster counts it in, but its ports do not answer from here."""

    name: str
    alive: bool
    note: Mapping[str, Any] = field(default_factory=dict)
    silent: bool = False

    @property
    def trouble(self) -> str:
        """Why it cannot be used, and what mends it; "" while it can."""
        if self.alive:
            return ""
        if self.silent:
            ports = f"TCP ports {self.port}-{self.port + COUNT - 1}"
            return f"does not answer from here: has it just ended, or does its firewall not let {ports} in?"
        return "gone: 'splitrun node join' on it brings it back"

    @property
    def host(self) -> str:
        """The address that its sockets listen on."""
        return str(self.note.get("host", ""))

    @property
    def resource(self) -> str:
        """What Ray knows this life of the node by."""
        return str(self.note.get("resource", ""))

    @property
    def port(self) -> int:
        """The first port of its range."""
        return int(self.note.get("port", 0))


def members(registry: Registry) -> list[NodeInfo]:
    """Every node that ever joined, sorted by name; one is alive when Ray says so and its port answers from here.

    Raises ClusterError when the head does not answer.
    """
    offered = registry.resources()
    found = []
    for name, note in sorted(registry.notes("node ").items()):
        node = NodeInfo(name, False, json.loads(note))
        counted = node.resource in offered
        alive = counted and answers(node.host, node.port + 1)
        found.append(replace(node, alive=alive, silent=counted and not alive))
    return found
