"""A cluster of Ray nodes on this machine, for tests: each node has its own ports, home and measurements."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import networks
import psutil

from splitrun.cluster import node
from splitrun.cluster.home import Home
from splitrun.cluster.ports import COUNT

TOKEN = secrets.token_hex(24)
"""Of every cluster of these tests: Ray reads the token once in the life of a process."""


class TestCluster:
    """Nodes by name; the first one is the coordinator's."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.homes: dict[str, Home] = {}
        self.ports: dict[str, int] = {}

    def add(self, name: str) -> Home:
        """A home and ports for a node that is not started yet."""
        if name not in self.homes:
            self.ports[name] = free_ports(self.ports.values())
            self.homes[name] = Home(self.folder / name)
        return self.homes[name]

    def start(self, name: str, host: str = "127.0.0.1") -> None:
        """Start the head, or join it."""
        home, port = self.add(name), self.ports[name]
        head = next(iter(self.homes))
        if name == head:
            home.keep_token(TOKEN)
            node.start_head(home, host, port=port, name=name)
        else:
            token = self.homes[head].token()
            node.join(home, f"127.0.0.1:{self.ports[head]}", token, port=port, name=name)

    def lead(self) -> None:
        """Let this process use the cluster of the first node."""
        os.environ["SPLITRUN_HOME"] = str(next(iter(self.homes.values())).folder)

    def start_beyond(self, line: networks.Line, name: str) -> None:
        """Join the head, which listens at this end of the line, as a machine at the other end: its own network, home
        and cache."""
        head = next(iter(self.homes))
        environment = {
            **os.environ,
            "HOME": str(self.folder / f"{name} home"),
            "SPLITRUN_HOME": str(self.add(name).folder),
            "SPLITRUN_CACHE": str(self.folder / f"{name} cache"),
            "SPLITRUN_TOKEN": self.homes[head].token(),
        }
        words = ["node", "join", f"{line.here}:{self.ports[head]}", "--name", name, "--port", str(self.ports[name])]
        command = line.command(sys.executable, "-m", "splitrun", *words)
        subprocess.run(command, check=True, env=environment, capture_output=True)

    def processes(self, name: str) -> list[psutil.Process]:
        """The node's process and everything that it started."""
        record = node.running(self.homes[name])
        assert record is not None
        main = psutil.Process(record.process)
        return [main, *main.children(recursive=True)]

    def lose(self, name: str, number: int = signal.SIGKILL) -> None:
        """What a pulled plug does: every process of the node at once."""
        for process in self.processes(name):
            process.send_signal(number)

    def stages(self, name: str) -> list[psutil.Process]:
        """The stage processes on a node."""
        return [one for one in self.processes(name) if "splitrun.engine.stage_process" in command(one)]

    def keepers(self, name: str) -> list[psutil.Process]:
        """The stages' keepers on a node."""
        return [one for one in self.processes(name) if command(one).startswith("ray::Keeper")]

    def stop(self) -> None:
        """End all nodes at once."""
        ending = [
            threading.Thread(target=node.stop, args=(home,)) for home in self.homes.values() if node.running(home)
        ]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()


def command(process: psutil.Process) -> str:
    """The command line of a process, "" when it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def shown(processes: Iterable[psutil.Process]) -> str:
    """What others may see of processes: command lines, and environments for those of the same user."""
    seen = []
    for process in processes:
        with suppress(psutil.Error):
            seen += [*process.cmdline(), *process.environ().values()]
    return "\n".join(seen)


def free_ports(taken: object = ()) -> int:
    """The base of a range of ports that nobody uses."""
    used = {entry.laddr.port for entry in psutil.net_connections("tcp") if entry.laddr}
    used |= {base + offset for base in list(taken) for offset in range(COUNT)}  # type: ignore[call-overload]
    start = 20000 + os.getpid() % 100 * 100
    for base in range(start, start + 20000, COUNT):
        if not used & set(range(base, base + COUNT)):
            return base
    raise AssertionError("no free range of ports")


@contextmanager
def cluster(folder: Path, *names: str) -> Iterator[TestCluster]:
    """Nodes with these names; this process is their driver meanwhile."""
    made = TestCluster(folder)
    before = os.environ.get("SPLITRUN_HOME", "")
    try:
        for name in names:
            made.start(name)
            made.lead()
        yield made
    finally:
        os.environ["SPLITRUN_HOME"] = before
        if "ray" in sys.modules:
            disconnect()
        made.stop()


@contextmanager
def cluster_over(line: networks.Line, folder: Path) -> Iterator[TestCluster]:
    """The head "near" at this end of the line, a node "far" at the other."""
    with cluster(folder) as made:
        made.start("near", line.here)
        made.start_beyond(line, "far")
        made.lead()
        yield made


def disconnect() -> None:
    """Leave the cluster as a driver, so that another can be joined."""
    import ray

    from splitrun.cluster import nodes

    ray.shutdown()
    nodes._connect.cache_clear()


def listening() -> dict[int, set[str]]:
    """Process id -> the addresses that it listens on."""
    found: dict[int, set[str]] = {}
    for entry in psutil.net_connections("tcp"):
        if entry.status == psutil.CONN_LISTEN and entry.pid is not None:
            address = entry.laddr.ip
            found.setdefault(entry.pid, set()).add(address.removeprefix("::ffff:") if entry.family == socket.AF_INET6
                                                   else address)  # fmt: skip
    return found
