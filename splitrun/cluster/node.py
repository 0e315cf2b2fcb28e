"""Start, join and stop the node of this machine. What runs then is in ``node_process``; knows nothing of stages."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import time

import psutil

from splitrun.child import child_command, child_environment
from splitrun.cluster.home import Home, NodeRecord
from splitrun.cluster.members import members
from splitrun.cluster.node_process import NodeSettings
from splitrun.cluster.ports import (
    LOOPBACK,
    address_towards,
    own_address,
    require_free,
    require_reachable,
    split_address,
)
from splitrun.cluster.process import LOCAL_NODE
from splitrun.cluster.runtime import Registry, remove_leftovers, set_environment
from splitrun.cluster.versions import differences, own_versions
from splitrun.errors import ClusterError

MODULE = "splitrun.cluster.node_process"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
START_S = 60.0
STOP_S = 10.0


def start_head(home: Home, host: str = LOOPBACK, port: int = 7400, name: str | None = None) -> NodeRecord:
    """Make this machine the first of a cluster. Raises ClusterError."""
    address = own_address(host)
    home.token()
    return _start(home, NodeSettings(str(home.folder), _node_name(name), address, port, None))


def join(
    home: Home, head: str, token: str, host: str | None = None, port: int = 7400, name: str | None = None
) -> NodeRecord:
    """Make this machine a further one of the cluster at ``head``, if both run the same versions. Raises ClusterError
    when they do not, and when the head is out of reach or refuses the token."""
    _require_none(home)
    there, head_port = split_address(head)
    require_reachable(there, head_port)
    address = address_towards(there, head_port) if host is None else own_address(host)
    home.keep_token(token)
    set_environment(home.token_file, address)
    settings = NodeSettings(str(home.folder), _node_name(name), address, port, f"{there}:{head_port}")
    _require_same_versions(Registry(settings.head_address), settings)
    return _start(home, settings)


def stop(home: Home) -> NodeRecord:
    """End the node of this machine with everything that it started. Raises ClusterError when there is none; what one
    that was killed has left behind goes either way."""
    record = running(home)
    if record is None:
        remove_leftovers()
        raise ClusterError("no node runs on this machine")
    process = psutil.Process(record.process)
    for number in (signal.SIGTERM, signal.SIGKILL):
        process.send_signal(number)
        try:
            process.wait(STOP_S)
            break
        except psutil.TimeoutExpired:
            continue
    home.forget_record()
    remove_leftovers()
    return record


def running(home: Home) -> NodeRecord | None:
    """The node of this machine, if its process runs."""
    record = home.record()
    if record is None:
        return None
    try:
        alive = MODULE in psutil.Process(record.process).cmdline()
    except psutil.Error:
        alive = False
    return record if alive else None


def join_command(home: Home, record: NodeRecord) -> str:
    """What to type on the next machine."""
    return f"splitrun node join {record.host}:{record.port} --token {home.token()}"


def _start(home: Home, settings: NodeSettings) -> NodeRecord:
    _require_none(home)
    require_free(settings.host, settings.port)
    home.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(home.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as log:
        process = subprocess.Popen(
            child_command(MODULE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env=child_environment(),
        )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin as pipe:
        pipe.write(json.dumps(dataclasses.asdict(settings)).encode() + b"\n")
    with process.stdout as pipe:
        line = pipe.readline()
    if not line:
        process.wait()
        raise ClusterError(f"the node's process ended at once: {home.log_file} says why")
    answer = json.loads(line)
    if "error" in answer:
        process.wait()
        raise ClusterError(str(answer["error"]))
    record = home.record()
    assert record is not None, "a node that is ready has left its record"
    return record


def _require_none(home: Home) -> None:
    record = running(home)
    if record is not None:
        raise ClusterError(f"node {record.name} runs here already: end it first with 'splitrun node stop'")


def _require_same_versions(registry: Registry, settings: NodeSettings) -> None:
    """Compare with the head; a difference is named here, and left there for ``node list``."""
    head = registry.get("head")
    note = registry.get(f"node {head}")
    if head is None or note is None:
        raise ClusterError(f"{settings.head} runs Ray, but not as a splitrun head: use 'splitrun node start' there")
    if settings.name in {member.name for member in members(registry) if member.alive}:
        raise ClusterError(f"there is a node {settings.name} already: choose another --name")
    found = differences(own_versions(), json.loads(note)["versions"])
    if found:
        told = {"host": settings.host, "when": time.time(), "differences": found}
        registry.put(f"refused {settings.name}", json.dumps(told))
        raise ClusterError(f"{settings.name} and {head} do not match: {'; '.join(found)}: install the same on both")


def _node_name(name: str | None) -> str:
    """A name that placements can use; by default the machine's."""
    chosen = name or re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).strip("-.")[:63] or "node"
    if not NAME.fullmatch(chosen) or LOCAL_NODE.fullmatch(chosen):
        raise ClusterError(
            f"--name {chosen!r} cannot be a node's name: letters, digits, dots and dashes, and not process or process-2"
        )
    return chosen
