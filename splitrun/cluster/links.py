"""What the way between two machines costs, measured with the sockets that will carry the activations.

On each node a small process (``node_link``) sends back what it gets. Knows nothing of models.
"""

from __future__ import annotations

import queue
import secrets
import statistics
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from itertools import combinations

import torch

from splitrun.cluster.keeper import ORPHAN_S
from splitrun.cluster.members import NodeInfo
from splitrun.cluster.nodes import NodeProcess, Nodes
from splitrun.cluster.ports import data_ports
from splitrun.cluster.versions import differences, own_versions
from splitrun.errors import ClusterError, SplitrunError
from splitrun.planner.facts import Link
from splitrun.transport.frames import Frame, Kind
from splitrun.transport.mailbox import Address
from splitrun.transport.socket import SocketMailbox

MODULE = "splitrun.cluster.node_link"
START_S = 20.0
ANSWER_S = 10.0
SMALL_ROUNDS = 30
LARGE_ROUNDS = 4
LARGE_SHAPE = (512, 1536)
"""A prompt chunk of a 1.5B model in bf16: 1.5 MB."""


def measure_link(
    mailbox: SocketMailbox, peer: str, session: int, arrived: queue.SimpleQueue[Frame], own: str = ""
) -> Link:
    """Latency and bandwidth of one direction, from round trips to a peer that answers small to everything.

    ``own`` is the name by which the peer knows this end. Raises ClusterError when it does not.
    """

    def seconds(body: torch.Tensor, step: int) -> float:
        started = time.perf_counter()
        mailbox.send(peer, Frame(Kind.STEP, session, step=step, control={"from": own}, body=body))
        try:
            arrived.get(timeout=ANSWER_S)
        except queue.Empty:
            raise ClusterError(
                f"{peer} does not answer on its data port: let its firewall open all 100 ports of the node"
            ) from None
        return time.perf_counter() - started

    small, large = torch.zeros(1, 1, dtype=torch.bfloat16), torch.zeros(LARGE_SHAPE, dtype=torch.bfloat16)
    seconds(small, 0)
    latency_s = statistics.median(seconds(small, 1 + index) for index in range(SMALL_ROUNDS)) / 2
    seconds(large, SMALL_ROUNDS)
    way_s = min(seconds(large, SMALL_ROUNDS + 1 + index) for index in range(LARGE_ROUNDS)) - 2 * latency_s
    return Link(latency_s, large.nbytes / max(way_s, 1e-5))


class Links:
    """One link process on each of the nodes; a context manager that ends them."""

    def __init__(self, nodes: Nodes, others: list[NodeInfo]) -> None:
        self._session = secrets.randbits(64)
        self._arrived: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._stack = ExitStack()
        self._mailbox = SocketMailbox(self._session, self._arrived.put, nodes.own.host, data_ports(nodes.own.port))
        self._stack.callback(self._mailbox.close)
        self._addresses = {"": self._mailbox.address}
        self._processes: dict[str, NodeProcess] = {}
        self.faults: dict[str, str] = {}
        for node in others:
            self._try(node.name, lambda node=node: self._start(nodes, node))
        for node in others:
            self._try(node.name, lambda node=node: self._learn(node.name))
        peers = {name: (address.endpoint, address.public_key) for name, address in self._addresses.items()}
        for process in self._processes.values():
            process.tell({"peers": peers})
        for name in list(self._processes):
            self._try(name, lambda name=name: self._processes[name].expect("connected", START_S))

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def from_here(self, name: str) -> Link:
        """From this machine to a node."""
        return measure_link(self._mailbox, name, self._session, self._arrived)

    def between(self, one: str, two: str) -> Link:
        """From one node to another."""
        self._processes[one].tell({"measure": two})
        latency_s, bandwidth = self._processes[one].expect("link", ANSWER_S * 3)
        return Link(float(latency_s), float(bandwidth))

    def all(self) -> dict[tuple[str, str], Link]:
        """Every pair that works; "" is this machine. What does not is in ``faults``."""
        found: dict[tuple[str, str], Link] = {}
        for name in sorted(self._processes):
            self._try(name, lambda name=name: found.update({("", name): self.from_here(name)}))
        for one, two in combinations(sorted(self._processes), 2):
            self._try(f"{one} to {two}", lambda one=one, two=two: found.update({(one, two): self.between(one, two)}))
        return found

    def _start(self, nodes: Nodes, node: NodeInfo) -> None:
        job = {"session": self._session, "own": node.name, "host": node.host, "ports": data_ports(node.port),
               "orphan_s": ORPHAN_S}  # fmt: skip
        self._processes[node.name] = process = nodes.start(f"{node.name}/cpu", job, MODULE)
        self._stack.callback(process.end_quietly)

    def _learn(self, name: str) -> None:
        endpoint, key = self._processes[name].expect("address", START_S)
        self._addresses[name] = Address(str(endpoint), str(key))
        self._mailbox.connect(name, self._addresses[name])

    def _try(self, name: str, action: object) -> None:
        """Run one step for a node; one that fails is done with."""
        assert callable(action)
        if name in self.faults:
            return
        try:
            action()
        except SplitrunError as error:
            self.faults[name] = str(error)
            self._processes.pop(name, None)


def check_nodes(nodes: Nodes) -> Iterator[tuple[str, str, bool]]:
    """Per node: its name, what was found in a line, and whether that is a fault."""
    found = nodes.all()
    others = [node for node in found if node.alive and node.name != nodes.own.name]
    with Links(nodes, others) as links:
        ways = links.all()
        for node in found:
            line, fault = _verdict(node, nodes.own.name, links.faults, ways)
            yield node.name, line, fault


def troubles(nodes: Nodes, names: Collection[str]) -> dict[str, str]:
    """What hinders these nodes from being used now, though they may be there: name -> fault; empty when all do.

    Raises ClusterError when the head does not answer."""
    found = {node.name: node for node in nodes.all() if node.name in names}
    known = {name: found[name].trouble if name in found else "gone" for name in names}
    faults = {name: trouble for name, trouble in known.items() if trouble}
    if faults:
        return faults
    with Links(nodes, list(found.values())) as links:
        links.all()
        return dict(links.faults)


def _verdict(
    node: NodeInfo, own: str, faults: Mapping[str, str], ways: Mapping[tuple[str, str], Link]
) -> tuple[str, bool]:
    if node.name == own:
        return "here", False
    if node.trouble:
        return node.trouble, True
    unlike = differences(own_versions(), node.note["versions"])
    if unlike:
        return f"does not match: {'; '.join(unlike)}", True
    if node.name in faults:
        return faults[node.name], True
    link = ways["", node.name]
    megabits = link.bandwidth_bytes_per_s * 8 / 1e6
    return f"good: {link.latency_s * 1e3:.2f} ms one way, {megabits:,.0f} Mbit/s", False
