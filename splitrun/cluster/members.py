"""Who is in the cluster: what each node left at the head, and whether it can be reached now.

Knows nothing of stages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitrun.cluster.ports import answers
from splitrun.cluster.runtime import Registry


@dataclass(frozen=True)
class NodeInfo:
    """One node. ``note`` is what it says of itself: host, port, cores, versions."""

    name: str
    alive: bool
    note: Mapping[str, Any] = field(default_factory=dict)

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
    found = [NodeInfo(name, False, json.loads(note)) for name, note in sorted(registry.notes("node ").items())]
    return [
        NodeInfo(node.name, node.resource in offered and answers(node.host, node.port + 1), node.note) for node in found
    ]
