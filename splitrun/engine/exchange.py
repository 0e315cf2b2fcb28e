"""Joins a pipeline to those of other processes: steps leave and arrive as frames through a mailbox.

The same in the coordinator and in a stage process. A step enters the pipeline here once, in order, or not at all. Knows
who runs which stage, nothing of how processes start or end.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor

from splitrun.engine.outcome import Outcome
from splitrun.engine.pipeline import Pipeline
from splitrun.schedule.flat import MalformedMessage
from splitrun.schedule.step import Step, Tokens
from splitrun.transport.frames import Frame
from splitrun.transport.gate import Gate, Verdict
from splitrun.transport.mailbox import Mailbox
from splitrun.transport.messages import step_frame, step_of, tokens_of

COORDINATOR = "coordinator"
_EPOCHS_KEPT = 4


@dataclass(frozen=True)
class Route:
    """The session, and who runs each stage: the device's name in the placement, or COORDINATOR."""

    session: int
    peers: tuple[str, ...]


class Exchange:
    """The frames of one process's pipeline. ``pipeline`` is set before the first frame arrives."""

    def __init__(self, route: Route, own: str) -> None:
        self.route = route
        self.pipeline: Pipeline | None = None
        self._own = own
        self._gates = [Gate() for _ in route.peers]
        self._tokens_gate = Gate()
        self._firsts: dict[int, int] = {}
        self._rows: dict[int, int] = {}

    @property
    def waiting(self) -> int:
        """Steps of this epoch that were sent and not settled."""
        epoch = max(self._firsts, default=0)
        return sum(1 for index in list(self._rows) if index >= self._firsts.get(epoch, 0))

    def adopt(self, stages: Collection[int]) -> None:
        """This process runs these stages from now on."""
        peers = (self._own if stage in stages else peer for stage, peer in enumerate(self.route.peers))
        self.route = replace(self.route, peers=tuple(peers))

    def settle(self, outcome: Outcome) -> None:
        """Note what came of a step. Whatever is no token ends the epoch, and with it all that is under way."""
        if isinstance(outcome, Tokens):
            self._rows.pop(outcome.step, None)
        else:
            self._rows.clear()

    def send_step(self, mailbox: Mailbox, stage: int, step: Step, activation: Tensor | None) -> None:
        """Send a step to the process of ``stage``. ``activation`` is on the CPU. Shape: (tokens, hidden)."""
        first = self._begin(step.epoch, step.index)
        if self._own == COORDINATOR:  # where tokens come back to
            self._rows[step.index] = step.rows
        mailbox.send(self.route.peers[stage], step_frame(self.route.session, stage, first, step, activation))

    def take_step(self, frame: Frame) -> Verdict:
        """Let an arriving step into the pipeline, if it is its turn. Raises MalformedMessage."""
        if frame.stage >= len(self.route.peers) or self.route.peers[frame.stage] != self._own or self.pipeline is None:
            raise MalformedMessage(f"stage {frame.stage} is not here")
        step = step_of(frame)
        if (frame.body is None) != (frame.stage == 0 or (bool(step.refill) and frame.stage not in step.refill)):
            raise MalformedMessage("the activation is missing, or nobody wants one")
        verdict = self._gates[frame.stage].judge(frame.epoch, frame.first, frame.step)
        if verdict == "run":
            self._begin(frame.epoch, frame.first)
            self.pipeline.arrived(frame.stage, step, frame.body)
        return verdict

    def take_tokens(self, frame: Frame) -> tuple[Verdict, Tokens]:
        """The tokens in a frame, and whether it is their turn. Raises MalformedMessage."""
        tokens = tokens_of(frame)
        first = self._firsts.get(frame.epoch)
        if first is None:
            return "stale", tokens
        if self._rows.get(frame.step) not in (len(tokens.rows), None):
            raise MalformedMessage("the tokens are not those of their step")
        verdict = self._tokens_gate.judge(frame.epoch, first, frame.step)
        if verdict == "stale":
            self.settle(tokens)
        return verdict, tokens

    def _begin(self, epoch: int, step: int) -> int:
        """The first step of the epoch, which is ``step`` when nobody knows of an earlier one."""
        first = self._firsts.setdefault(epoch, step)
        if len(self._firsts) > _EPOCHS_KEPT:
            self._firsts.pop(min(self._firsts), None)
            for index in [index for index in list(self._rows) if index < first]:
                self._rows.pop(index, None)
        return first
