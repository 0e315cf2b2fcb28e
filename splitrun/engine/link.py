"""What a pipeline is made of: stages in their places, here or in another process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from splitrun.schedule.scheduler import Held
from splitrun.schedule.step import IntArray, Step, Tokens
from splitrun.transport.local import Hop, Worker

LESS = "fewer layers there"
"""What mends a full device where the plan is not at hand."""


class Stage(Protocol):
    """What the pipeline needs of a stage."""

    def any_thread(self, step: Step) -> bool:
        """Whether the step may run on another thread than that of the stage's worker."""

    def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
        """The activation behind the stage's last unit, or the tokens when it has the head."""

    def close(self) -> None:
        """Give the memory back."""


@runtime_checkable
class RestorableStage(Protocol):
    """A stage that may have been in another process and lost with it."""

    def restore(self, tables: Mapping[str, IntArray], start: int, rows: Tensor) -> None:
        """Put KV of one sequence into its blocks, from the token ``start`` on. Shape: (tokens, values)."""


@runtime_checkable
class EagerStage(Protocol):
    """A stage that does some of a step's work before the step comes."""

    def prepare(self, step: Step) -> None:
        """Make ready for a step that is expected, with zeros for its tokens; the same object comes to ``run`` with the
        tokens filled in, or another step in its place. Any thread, while steps before it run."""


@dataclass(frozen=True)
class Link:
    """One stage in its place: its worker, its name in messages, the hop behind it (None at the head), and what to plan
    with when its device is full."""

    stage: Stage
    worker: Worker
    name: str
    onward: Hop | None
    relief: str = LESS


@dataclass(frozen=True)
class RemoteLink:
    """One stage in another process: how to send it a step with its activation (on the CPU), and the hop from main
    memory to the stage behind it, if that one is here."""

    name: str
    send: Callable[[Step, Tensor | None], None]
    onward: Hop | None


class Elsewhere(Protocol):
    """The stages in other processes, as a whole."""

    @property
    def alive(self) -> bool:
        """Whether all of them run, or are being started again."""

    def begin(self, requests: Collection[int]) -> None:
        """These requests are about to run."""

    def forget(self, request: int) -> None:
        """This request has ended."""

    def kept_bytes(self, stage: int) -> int:
        """Bytes of a stage's KV that are kept here."""

    def restore(self, loss: int, held: Iterable[Held]) -> None:
        """See `Pipeline.restore`."""

    def close(self) -> None:
        """End them."""
