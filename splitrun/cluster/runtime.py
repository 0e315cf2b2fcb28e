"""Starts Ray's processes on this machine, with our ports, our token and nothing that a home does not need.

Ray's own command cannot bind to the loopback and join a second node, so its `Node` is made directly, as Ray's tests do.
Knows nothing of stages.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import psutil

from splitrun.cluster.ports import COUNT, is_loopback
from splitrun.errors import ClusterError

OBJECT_STORE_BYTES = 80 << 20
"""Nothing large travels through Ray; it asks for no less."""
MOST_CHARACTERS = 16
PREFIX = "splitrun-ray-"
"""Of the folder of a node; its process's number follows."""
_SPACE = b"splitrun"
OWN_THREADS = "SPLITRUN_NODE_OMP_NUM_THREADS"
"""What OMP_NUM_THREADS was before Ray set it for its workers."""


def ray_environment(token_file: Path, host: str) -> dict[str, str]:
    """The settings that Ray reads from the environment, to be set before it is imported."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        # With clusters off, Ray keeps the loopback address that it is given and listens there alone.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if is_loopback(host) else "1",
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_worker_niceness": "0",  # a stage there is worth what one of the serving process is
        # A short cut of the line must not cost a node its membership: stages are watched over by their own heartbeats.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "10",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # A call after this process has left the cluster is an error, and starts no cluster of Ray's own.
        "RAY_ENABLE_AUTO_CONNECT": "0",
    }


def set_environment(token_file: Path, host: str) -> None:
    """Prepare this process for Ray, and for another kind of address than that of the cluster it has left."""
    os.environ.update(ray_environment(token_file, host))
    constants: Any = sys.modules.get("ray._private.ray_constants")
    if constants is not None:  # read from the environment once; on, it would turn the loopback into another address
        constants.ENABLE_RAY_CLUSTER = not is_loopback(host)


class Runtime:
    """Ray's processes of one node, alive until ``stop``, or until this process ends.

    ``resource`` is what Ray knows it by, ``head`` the address of the first machine's registry, None on the first
    machine itself. Raises ClusterError.
    """

    def __init__(self, resource: str, host: str, port: int, head: str | None) -> None:
        from ray._private.node import Node
        from ray._private.parameter import RayParams

        remove_leftovers()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=_temporary()))
        parameters = RayParams(
            node_ip_address=host,
            node_manager_port=port + 1,
            object_manager_port=port + 2,
            runtime_env_agent_port=port + 3,
            metrics_agent_port=port + 4,
            dashboard_agent_listen_port=port + 5,
            metrics_export_port=port + 6,
            min_worker_port=port + 10,
            max_worker_port=port + COUNT // 2 - 1,
            include_dashboard=False,
            include_log_monitor=False,
            no_monitor=True,
            object_store_memory=OBJECT_STORE_BYTES,
            resources={resource: 1},
            temp_dir=str(self._folder),
        )
        if head is None:
            parameters.gcs_server_port = port
        else:
            parameters.gcs_address = head
        try:
            self._node: Any = Node(parameters, head=head is None, shutdown_at_exit=True, spawn_reaper=True)
        except Exception as error:  # Ray raises bare Exception here
            shutil.rmtree(self._folder, ignore_errors=True)
            reason = " ".join(str(error).split())[:200]
            raise ClusterError(f"Ray did not start on {host}:{port}: {reason}") from error

    @property
    def alive(self) -> bool:
        """Whether all of Ray's processes run."""
        return not self._node.dead_processes()

    def stop(self) -> None:
        """End them, and remove what they wrote."""
        children = psutil.Process().children(recursive=True)  # Ray does not wait for its agents and workers
        self._node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=5)
        shutil.rmtree(self._folder, ignore_errors=True)


def _temporary() -> Path:
    """Where Ray's folders lie: its sockets are deep in them, and their paths may have 107 characters."""
    usual = Path(tempfile.gettempdir())
    return usual if len(str(usual)) <= MOST_CHARACTERS else Path("/tmp")


def remove_leftovers() -> None:
    """Remove what nodes of this user wrote whose processes have ended without doing so."""
    for folder in _temporary().glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        with suppress(OSError):
            ended = owner.isdecimal() and not psutil.pid_exists(int(owner))
            if ended and folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)


class _Notes(Protocol):
    """What is used of Ray's client of its registry, which is compiled and without types."""

    def internal_kv_get(self, key: bytes, space: bytes, timeout: float) -> bytes | None:
        """A note."""

    def internal_kv_put(self, key: bytes, note: bytes, replace: bool, space: bytes, timeout: float) -> int:
        """Leave a note."""

    def internal_kv_del(self, key: bytes, by_prefix: bool, space: bytes, timeout: float) -> int:
        """Remove a note."""

    def internal_kv_keys(self, prefix: bytes, space: bytes, timeout: float) -> list[bytes]:
        """Keys of notes."""

    def get_all_node_info(self, timeout: float) -> dict[Any, Any]:
        """The nodes by their ids."""


class Registry:
    """Small notes at the head, readable by every node: who is there with which versions, and who was refused.

    Raises ClusterError when the head does not answer or does not accept the token.
    """

    def __init__(self, head: str) -> None:
        self._head = head
        with _translated(head):
            self._client: _Notes = import_module("ray._raylet").GcsClient(address=head)

    def get(self, key: str) -> str | None:
        """The note under that key."""
        with _translated(self._head):
            found = self._client.internal_kv_get(key.encode(), _SPACE, timeout=5)
        return None if found is None else bytes(found).decode()

    def put(self, key: str, note: str) -> None:
        """Leave a note."""
        with _translated(self._head):
            self._client.internal_kv_put(key.encode(), note.encode(), True, _SPACE, timeout=5)

    def remove(self, key: str) -> None:
        """Take a note away."""
        with _translated(self._head):
            self._client.internal_kv_del(key.encode(), False, _SPACE, timeout=5)

    def notes(self, prefix: str) -> Mapping[str, str]:
        """Key without the prefix -> note."""
        with _translated(self._head):
            keys = self._client.internal_kv_keys(prefix.encode(), _SPACE, timeout=5)
        names = [bytes(key).decode() for key in keys]
        found = {name.removeprefix(prefix): self.get(name) for name in names}
        return {name: note for name, note in found.items() if note is not None}

    def resources(self) -> set[str]:
        """What the nodes that Ray takes to be alive offer. It notices a silent one's end after some seconds only."""
        with _translated(self._head):
            found = self._client.get_all_node_info(timeout=5)
        return {name for info in found.values() if info.state == 0 for name in info.resources_total}


@contextmanager
def _translated(head: str) -> Iterator[None]:
    """Ray's errors of a call to the head as ours."""
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(
            f"{head} refuses the token: copy the whole command that 'splitrun node start' printed there"
        ) from error
    except RayError as error:
        reason = " ".join(str(error).split())[:160]
        raise ClusterError(f"{head} does not answer as a splitrun head: {reason}; is Ray the same there?") from error
