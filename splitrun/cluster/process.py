"""A process of splitrun's own that computes for this one: start it, speak with it over its pipes, end it.

Lines of JSON go both ways: the job with its keys to standard input, never argv or environment, and what became of it
back from standard output. While the pipe is open the parent lives; its end ends the process. Knows nothing of what
the process computes.
"""

from __future__ import annotations

import json
import queue
import re
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from splitrun import errors
from splitrun.child import child_command, child_environment
from splitrun.errors import SplitrunError, StageLost

STAGE_MODULE = "splitrun.engine.stage_process"
LOCAL_NODE = re.compile(r"process(-[1-9][0-9]{0,3})?")
"""Nodes with these names are processes on this machine."""


def local_device(name: str) -> str:
    """The device of this machine that ``name`` uses: itself, or what a process on this machine runs on."""
    node, _, device = name.rpartition("/")
    return device if LOCAL_NODE.fullmatch(node) else name


def machine_of(device: str) -> str:
    """The node that a device belongs to, "" for this machine and processes on it."""
    return local_device(device).rpartition("/")[0]


def failures_of(devices: Iterable[str], action: Callable[[str], object]) -> dict[str, SplitrunError]:
    """Do something for each device; device -> the error, for those where it failed."""
    failures: dict[str, SplitrunError] = {}
    for device in sorted(devices):
        try:
            action(device)
        except SplitrunError as error:
            failures[device] = error
    return failures


class StageHandle(Protocol):
    """A stage process, wherever it runs."""

    @property
    def end(self) -> str:
        """How the process ended, "" while it runs."""

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send it a line. A process that has ended is told nothing."""

    def expect(self, key: str, silence_s: float) -> Any:
        """What the process says under that key. Raises the error that it reports, or StageLost when it ends or gives
        no sign of life for that long."""

    def kill(self) -> None:
        """End it at once and wait for its end."""


class Sayings:
    """What a process has said, in order; None is its end. ``name`` stands for it in messages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def add(self, message: dict[str, Any] | None) -> None:
        """Any thread."""
        self._said.put(message)

    def take(self, wait_s: float) -> list[dict[str, Any] | None]:
        """What was said since the last time; waits for it, but no longer than that."""
        found: list[dict[str, Any] | None] = []
        try:
            found.append(self._said.get(timeout=wait_s))
            while True:
                found.append(self._said.get_nowait())
        except queue.Empty:
            return found

    def expect(self, key: str, silence_s: float) -> Any:
        """See `StageHandle`; a process that ended raises StageLost without saying how."""
        while True:
            try:
                said = self._said.get(timeout=silence_s)
            except queue.Empty:
                raise StageLost(f"{self.name} gave no sign of life for {silence_s:.0f} s") from None
            if said is None:
                self._said.put(None)
                raise StageLost(f"{self.name} has ended")
            if "error" in said:
                raise error_of(said["error"])
            if key in said:
                return said[key]


class StageProcess:
    """A `StageHandle` of a process on this machine. ``name`` stands for it in messages."""

    def __init__(
        self,
        name: str,
        job: Mapping[str, Any],
        module: str = STAGE_MODULE,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._child = subprocess.Popen(
            child_command(module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Its own session, so that Ctrl-C reaches the coordinator alone.
            start_new_session=True,
            env={**(environment or child_environment()), "TOKENIZERS_PARALLELISM": "false"},
        )
        self.said = Sayings(name)
        self._telling = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name=f"splitrun {name}", daemon=True)
        self._thread.start()
        self.tell(job)

    @property
    def process_id(self) -> int:
        """The process."""
        return self._child.pid

    @property
    def end(self) -> str:
        """See `StageHandle`."""
        status = self._child.poll()
        if status is None:
            return ""
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"

    def tell(self, message: Mapping[str, Any]) -> None:
        """See `StageHandle`."""
        assert self._child.stdin is not None
        try:
            with self._telling:
                self._child.stdin.write(json.dumps(message).encode() + b"\n")
                self._child.stdin.flush()
        except (BrokenPipeError, ValueError):
            return  # it has ended, or was killed here: whoever expects an answer learns that

    def expect(self, key: str, silence_s: float) -> Any:
        """See `StageHandle`."""
        try:
            return self.said.expect(key, silence_s)
        except StageLost:
            if self.end:
                raise StageLost(f"{self.said.name} {self.end}") from None
            raise

    def kill(self) -> None:
        """See `StageHandle`."""
        self._child.kill()
        self._child.wait()
        self._thread.join()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what was not written yet needs no writing now

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if isinstance(said, dict):
                self.said.add(said)
        self._child.wait()
        self.said.add(None)


def error_of(described: Any) -> SplitrunError:
    """An error that a process reported as its class's name and message."""
    name, message = described
    kind = getattr(errors, str(name), None)
    if isinstance(kind, type) and issubclass(kind, SplitrunError):
        return kind(str(message))
    return StageLost(str(message))
