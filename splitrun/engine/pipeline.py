"""Steps through the stages: each device's worker runs its stages' share of a step and hands the activation on.

Knows the order of stages and nothing of requests. Results arrive in the order in which steps were submitted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from splitrun.errors import DeviceOutOfMemory, SplitrunError, StageLost
from splitrun.schedule.step import Step, Tokens
from splitrun.transport.local import Hop, Parcel, Worker


class Stage(Protocol):
    """What the pipeline needs of a stage."""

    def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
        """The activation behind the stage's last unit, or the tokens when it has the head."""

    def close(self) -> None:
        """Give the memory back."""


@dataclass(frozen=True)
class Failure:
    """A step that a stage could not finish."""

    step: int
    epoch: int
    error: SplitrunError


@dataclass
class StageClock:
    """Seconds that a stage spent on steps; written by its worker, read by anyone."""

    last_s: float = 0.0
    total_s: float = 0.0
    steps: int = 0

    def add(self, seconds: float) -> None:
        """Count one step."""
        self.last_s = seconds
        self.total_s += seconds
        self.steps += 1


@dataclass(frozen=True)
class Link:
    """One stage in its place: its worker, its name in messages, and the hop behind it (None at the head)."""

    stage: Stage
    worker: Worker
    name: str
    onward: Hop | None


class Pipeline:
    """Stages in a row. ``deliver`` is called from a worker's thread with each step's Tokens or Failure."""

    def __init__(self, links: Sequence[Link], deliver: Callable[[Tokens | Failure], None]) -> None:
        self._links = tuple(links)
        self._deliver = deliver
        self._closing = threading.Event()
        self.clocks = tuple(StageClock() for _ in self._links)

    def submit(self, step: Step) -> None:
        """Send a step on its way; returns at once."""
        self._post(0, step, None)

    @property
    def alive(self) -> bool:
        """Whether every worker runs."""
        return all(link.worker.alive for link in self._links)

    def close(self) -> None:
        """Let steps in flight go, close the stages on their own workers, and end the workers."""
        self._closing.set()
        for link in self._links:
            link.worker.call(link.stage.close)
        for worker in {id(link.worker): link.worker for link in self._links}.values():
            worker.close()

    def _post(self, index: int, step: Step, parcel: Parcel | None) -> None:
        link = self._links[index]

        def failed(error: Exception) -> None:
            self._deliver(Failure(step.index, step.epoch, translated(error, link.name)))

        link.worker.post(lambda: self._run(index, step, parcel), failed)

    def _run(self, index: int, step: Step, parcel: Parcel | None) -> None:
        """One stage's share of a step, on the stage's worker."""
        if self._closing.is_set():
            return
        link = self._links[index]
        started = time.perf_counter()
        arriving = self._links[index - 1].onward if index else None
        incoming = arriving.receive(parcel) if arriving is not None and parcel is not None else None
        result = link.stage.run(step, incoming)
        if isinstance(result, Tokens):
            self.clocks[index].add(time.perf_counter() - started)
            self._deliver(result)
            return
        assert link.onward is not None, f"{link.name} has no head and no stage behind it"
        onward = link.onward.send(result)
        self.clocks[index].add(time.perf_counter() - started)
        self._post(index + 1, step, onward)


def translated(error: Exception, name: str) -> SplitrunError:
    """An error of a stage as one of ours, naming the stage."""
    if isinstance(error, SplitrunError):
        return error
    reason = str(error).strip().split("\n")[0][:200]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in reason:
        return DeviceOutOfMemory(
            f"{name} ran out of memory: plan with less context, fewer sessions or fewer layers there"
        )
    return StageLost(f"{name} failed: {type(error).__name__}: {reason}")
