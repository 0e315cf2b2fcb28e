"""The process of a node: keeps Ray's processes of this machine running, and the machine a member, until it is ended.

Told by one line of JSON on standard input; answers with one on standard output, ``ready`` or ``error``, and then goes
on alone. When the head is gone for long, or has given this machine up, it joins again. Knows nothing of stages.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitrun.cluster.home import Home, NodeRecord
from splitrun.cluster.runtime import OWN_THREADS, Registry, Runtime, set_environment
from splitrun.cluster.versions import own_versions
from splitrun.errors import ClusterError

WATCH_S = 1.0
REJOIN_S = 3.0
"""Between two attempts to join again."""


@dataclass(frozen=True)
class NodeSettings:
    """Who this node is. ``head``: HOST:PORT of the first machine, None on itself."""

    home: str
    name: str
    host: str
    port: int
    head: str | None

    @property
    def head_address(self) -> str:
        """Where the registry is."""
        return self.head or f"{self.host}:{self.port}"


def describe(settings: NodeSettings, resource: str) -> dict[str, Any]:
    """What other machines may know of this one."""
    import psutil

    return {
        "resource": resource,
        "host": settings.host,
        "port": settings.port,
        "machine": socket.gethostname(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "versions": own_versions(),
    }


def start(settings: NodeSettings) -> Runtime:
    """Start Ray's processes and say who this is. Raises ClusterError; nothing runs then."""
    resource = f"splitrun:{settings.name}:{secrets.token_hex(4)}"  # another one for each life of a node
    runtime = Runtime(resource, settings.host, settings.port, settings.head)
    try:
        registry = Registry(settings.head_address)
        if settings.head is None:
            registry.put("head", settings.name)
        registry.put(f"node {settings.name}", json.dumps(describe(settings, resource)))
        registry.remove(f"refused {settings.name}")
    except ClusterError:
        runtime.stop()
        raise
    return runtime


def keep(settings: NodeSettings, runtime: Runtime, ended: threading.Event) -> None:
    """Hold the membership until ``ended``. A head that lost its registry ends: the others would not find it again."""
    current: Runtime | None = runtime
    while not ended.wait(WATCH_S if current is not None else REJOIN_S):
        if current is not None and current.alive:
            continue
        if current is not None:
            print(f"splitrun: Ray's processes of {settings.name} have ended", file=sys.stderr, flush=True)
            current.stop()
            current = None
        if settings.head is None:
            return
        try:
            current = start(settings)
            print(f"splitrun: {settings.name} has joined {settings.head} again", file=sys.stderr, flush=True)
        except ClusterError as error:
            print(f"splitrun: {error}", file=sys.stderr, flush=True)
    if current is not None:
        current.stop()


def main() -> None:
    """Entry."""
    settings = NodeSettings(**json.loads(sys.stdin.readline()))
    home = Home(Path(settings.home))
    parent = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    ended = threading.Event()
    os.environ.setdefault(OWN_THREADS, os.environ.get("OMP_NUM_THREADS", ""))
    set_environment(home.token_file, settings.host)
    try:
        runtime = start(settings)
    except ClusterError as error:
        parent.write(json.dumps({"error": str(error)}) + "\n")
        parent.flush()
        sys.exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own, which would drain for half a minute
        signal.signal(number, lambda *_: ended.set())
    home.keep_record(NodeRecord(settings.name, settings.host, settings.port, settings.head_address, os.getpid()))
    parent.write(json.dumps({"ready": True}) + "\n")
    parent.close()
    keep(settings, runtime, ended)
    home.forget_record()


if __name__ == "__main__":
    main()
