"""The cluster as the coordinator sees it: which nodes there are, and stage processes on them.

It and `calls` are the only modules whose functions speak to a running Ray. Ray is imported when a `Nodes` is made, so
whoever names no second machine never loads it. Knows nothing of what the processes compute.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from splitrun.cluster.calls import asked, steady, waited
from splitrun.cluster.home import Home, NodeRecord
from splitrun.cluster.keeper import Keeper
from splitrun.cluster.members import NodeInfo, members
from splitrun.cluster.model_here import Provider
from splitrun.cluster.node import running
from splitrun.cluster.process import STAGE_MODULE, Sayings
from splitrun.cluster.runtime import Registry, set_environment
from splitrun.errors import ClusterError, StageLost

POLL_S = 0.5
FIRST_CONTACT_S = 20.0
"""How long a node may take to start its first keeper."""
CONTACT_S = 2.5
"""How long it may take from then on, or three times what it took before, if that is more."""
KILL_S = 1.5
"""How long a keeper may take to end its process, or to answer anything; one that takes longer is out of reach."""
LAST_CHANCE_S = 0.5
"""How long one may take that has not answered for so long already."""
STORE_S = 60.0


class NodeLost(StageLost):
    """The whole node is gone or out of reach: starting the stage there again is of no use."""


class Membership:
    """Who is in the cluster that this machine's node belongs to. Raises ClusterError when there is none."""

    def __init__(self, home: Home) -> None:
        record = running(home)
        if record is None:
            raise ClusterError("this machine is no node yet: run 'splitrun node start', or 'splitrun node join' here")
        self.own = record
        set_environment(home.token_file, record.host)
        self._registry = Registry(record.head)

    def all(self) -> list[NodeInfo]:
        """Every node that ever joined, sorted by name. Raises ClusterError when the head does not answer."""
        return members(self._registry)

    def node(self, name: str) -> NodeInfo:
        """The living node of that name; raises ClusterError."""
        found = self.all()
        for node in found:
            if node.name == name and node.alive:
                return node
        known = ", ".join(node.name for node in found if node.alive)
        raise ClusterError(f"there is no node {name} now, only {known}: 'splitrun node join' on it, or plan again")

    def refused(self) -> Mapping[str, Any]:
        """Nodes that wanted to join with other versions: name -> what differs."""
        return {name: json.loads(note) for name, note in self._registry.notes("refused ").items()}


class Nodes(Membership):
    """The cluster, with this process as one of its drivers. Raises ClusterError when there is none."""

    def __init__(self, home: Home | None = None) -> None:
        super().__init__(home or Home.default())
        _connect(self.own)
        self._contact_s: dict[str, float] = {}

    def start(
        self, device: str, job: Mapping[str, Any], module: str = STAGE_MODULE, provider: Provider | None = None
    ) -> NodeProcess:
        """Start a process on the node of ``device``; ``provider`` answers its questions about the model.

        Raises NodeLost when there is no such node now.
        """
        from ray.exceptions import RaySystemError

        name = device.rpartition("/")[0]
        resource = next((node.resource for node in self.all() if node.name == name and node.alive), None)
        if resource is None:
            raise NodeLost(f"{device}: node {name} has left the cluster, or is out of reach")
        known_s = self._contact_s.get(name)
        limit_s = FIRST_CONTACT_S if known_s is None else max(CONTACT_S, 3 * known_s)

        def contacted(seconds: float) -> None:
            self._contact_s[name] = seconds

        try:
            return NodeProcess(device, resource, module, job, limit_s, provider, contacted)
        except RaySystemError as left:
            raise NodeLost(f"{device}: this process has left the cluster") from left


class NodeProcess:
    """A `StageHandle` of a process on another node, kept there by a `Keeper`."""

    def __init__(
        self,
        device: str,
        resource: str,
        module: str,
        job: Mapping[str, Any],
        contact_s: float,
        provider: Provider | None = None,
        on_contact: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        import ray

        options = {"num_cpus": 0, "resources": {resource: 0.001}, "max_concurrency": 4}
        with steady():
            self._actor: Any = ray.remote(Keeper).options(**options).remote(device, module, dict(job))
        self.name = device
        self._contact_s = contact_s
        self._on_contact = on_contact
        self._provider = provider
        self._asked: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._said = Sayings(device)
        self._contacted = threading.Event()
        self._answered_s = time.monotonic()
        self._closing = threading.Event()
        self.end = ""
        self._thread = threading.Thread(target=self._listen, name=f"splitrun {device}", daemon=True)
        self._thread.start()
        if provider is not None:
            threading.Thread(target=self._provide, name=f"splitrun model {device}", daemon=True).start()

    def tell(self, message: Mapping[str, Any]) -> None:
        """See `StageHandle`."""
        from ray.exceptions import RaySystemError

        with contextlib.suppress(RaySystemError):
            asked(self._actor.tell, dict(message))

    def expect(self, key: str, silence_s: float) -> Any:
        """See `StageHandle`. A node that does not even start the process in ``contact_s`` raises NodeLost then."""
        if not self._contacted.wait(self._contact_s):
            raise NodeLost(f"{self._said.name}: its node does not answer")
        try:
            return self._said.expect(key, silence_s)
        except StageLost:
            if self.end:
                raise StageLost(f"{self._said.name} {self.end}") from None
            raise

    def kill(self) -> None:
        """See `StageHandle`. A node out of reach ends it itself, after `keeper.ORPHAN_S`; NodeLost says so."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        self._closing.set()
        reached = True
        if self._contacted.is_set():
            try:
                waited(asked(self._actor.kill), self._kill_s)
            except GetTimeoutError:
                reached = False
            except RayError:
                reached = True  # the keeper has ended, and its process with it
        with contextlib.suppress(RayError), steady():
            ray.kill(self._actor)
        if not reached:
            raise NodeLost(f"{self._said.name}: its node does not answer")
        self._thread.join(2 * POLL_S)

    @property
    def _kill_s(self) -> float:
        """How long to wait for the keeper: it says something every POLL_S, unless it is out of reach."""
        silent_s = time.monotonic() - self._answered_s - POLL_S
        return max(LAST_CHANCE_S, KILL_S - max(0.0, silent_s))

    def store(self, folder: str, file: str, start: int, data: bytes) -> Any:
        """Send a piece of a file there; returns what ``await_stored`` waits for. Raises ClusterError."""
        from ray.exceptions import RaySystemError

        try:
            return asked(self._actor.store, folder, file, start, data)
        except RaySystemError as error:
            raise ClusterError(str(error)) from error

    def await_stored(self, piece: Any) -> None:
        """Wait until a piece is written. Raises ClusterError when it is not."""
        from ray.exceptions import RayError

        try:
            waited(piece, STORE_S)
        except RayError as error:
            raise ClusterError(f"{self.name} does not take the model's files: {type(error).__name__}") from error

    def _provide(self) -> None:
        assert self._provider is not None
        while (message := self._asked.get()) is not None:
            self._provider.answer(self, message)

    def end_quietly(self) -> None:
        """End it if it can be reached."""
        with contextlib.suppress(NodeLost):
            self.kill()

    def _listen(self) -> None:
        """Ask the keeper for news until one of them ends."""
        from ray.exceptions import GetTimeoutError, RayError

        began = time.monotonic()
        answer: Any = None
        while not self._closing.is_set():
            try:
                answer = answer or asked(self._actor.said, POLL_S)
                for message in waited(answer, 4 * POLL_S):
                    if "ended" in message:
                        self.end = str(message["ended"]) or "has ended"
                    elif "wants" in message or "lacks_model" in message:
                        self._asked.put(message)
                    else:
                        self._said.add(message)
                answer = None
            except GetTimeoutError:
                # Late, but what it brings is said once. Whoever waits for a sign of life has a clock of its own.
                self.tell({"alive": True})
                continue
            except RayError as error:
                self.end = f"was lost with its node or keeper ({type(error).__name__})"
            self._answered_s = time.monotonic()
            if not self._contacted.is_set():
                self._contacted.set()
                self._on_contact(time.monotonic() - began)
            if self.end:
                break
        self._said.add(None)
        self._asked.put(None)


@cache
def _connect(record: NodeRecord) -> None:
    """Make this process a driver of the cluster. Ray allows one cluster per process."""
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(
            address=record.head,
            _node_ip_address=record.host,
            namespace="splitrun",
            log_to_driver=False,
            logging_level="error",
            configure_logging=False,
        )
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ClusterError(f"Ray at {record.head} cannot be reached from here: {reason}") from error
    # What it has to say of nodes would go to standard output, which is the user's; of those that matter we speak.
    worker: Any = import_module("ray._private.worker")
    worker.print_to_stdstream = _said_nothing


def _said_nothing(data: object, ignore_prefix: bool = False) -> None:
    """In place of Ray's function that prints."""
