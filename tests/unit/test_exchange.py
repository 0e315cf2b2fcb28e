"""Steps between two pipelines over a network that misbehaves: each runs once and in order, or is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from splitrun.engine.exchange import COORDINATOR, Exchange, Route
from splitrun.engine.link import Link, RemoteLink
from splitrun.engine.outcome import Failure, Outcome
from splitrun.engine.pipeline import Pipeline
from splitrun.errors import StageError
from splitrun.schedule.flat import MalformedMessage
from splitrun.schedule.step import RowTokens, Step, Tokens
from splitrun.transport.frames import Frame
from splitrun.transport.journal import Journal
from splitrun.transport.local import Failed, FromHost, SameMemory, Task
from splitrun.transport.mailbox import FakeNetwork, Mailbox
from splitrun.transport.messages import step_frame

SESSION, HIDDEN = 9, 3
ROUTE = Route(SESSION, (COORDINATOR, "process/cpu", COORDINATOR))


class InPlace:
    """A worker without a thread."""

    alive = True

    def post(self, task: Task, failed: Failed) -> None:
        try:
            behind = task()
            if behind is not None:
                behind()
        except (StageError, AssertionError) as error:
            failed(error)


class AddOne:
    """A stage that adds one; at the end the sum is the token. Remembers the steps that it ran."""

    def __init__(self, head: bool = False) -> None:
        self.ran: list[int] = []
        self.saw: list[float] = []
        self._head = head

    def any_thread(self, step: Step) -> bool:
        return False

    def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
        self.ran.append(step.index)
        if int(step.token_ids[0]) == 99:
            raise StageError("planted")
        activation = torch.zeros(1, HIDDEN) if incoming is None else incoming
        self.saw.append(float(activation[0, 0]))
        if self._head:
            return Tokens(step.index, step.epoch, (RowTokens((int(activation[0, 0]) + 1,)),))
        return activation + 1

    def close(self) -> None:
        """Nothing to give back."""


class Two:
    """A coordinator with the first and last stage, and a process with the one between."""

    def __init__(self) -> None:
        self.network = FakeNetwork(SESSION)
        self.here, self.there = Exchange(ROUTE, COORDINATOR), Exchange(ROUTE, "process/cpu")
        self.verdicts: list[str] = []
        self.outcomes: list[Outcome] = []
        near, far = self.network.mailbox(self.take_here), self.network.mailbox(self.take_there)
        near.connect("process/cpu", far.address)
        far.connect(COORDINATOR, near.address)
        self.stages = (AddOne(), AddOne(), AddOne(head=True))
        worker: Any = InPlace()
        self.here.pipeline = Pipeline(
            [
                Link(self.stages[0], worker, "first", SameMemory()),
                RemoteLink("second", sender(self.here, near, 1), FromHost("cpu")),
                Link(self.stages[2], worker, "third", None),
            ],
            self.outcome,
            journals={1: Journal(2, 8)},
        )
        self.there.pipeline = Pipeline(
            [
                RemoteLink("first", sender(self.there, far, 0), FromHost("cpu")),
                Link(self.stages[1], worker, "second", SameMemory()),
                RemoteLink("third", sender(self.there, far, 2), None),
            ],
            self.outcome,
        )

    def outcome(self, outcome: Outcome) -> None:
        self.here.settle(outcome)
        self.outcomes.append(outcome)

    def take_here(self, frame: Frame) -> None:
        self.verdicts.append(self.here.take_step(frame))

    def take_there(self, frame: Frame) -> None:
        self.verdicts.append(self.there.take_step(frame))

    def submit(self, index: int, epoch: int = 0, token: int = 1, refill: tuple[int, ...] = ()) -> None:
        assert self.here.pipeline is not None
        self.here.pipeline.submit(replace(make_step(index, epoch, token), refill=refill))


def sender(exchange: Exchange, mailbox: Mailbox, stage: int) -> Callable[[Step, Tensor | None], None]:
    return lambda step, activation: exchange.send_step(mailbox, stage, step, activation)


def make_step(index: int, epoch: int = 0, token: int = 1) -> Step:
    one = numpy.array([token], numpy.int32)
    zero = numpy.zeros(1, numpy.int32)
    return Step(index, epoch, one, numpy.array([0, 1], numpy.int32), zero, zero, {}, (None,), (None,), None, (False,))


def test_a_step_goes_out_and_comes_back() -> None:
    two = Two()
    for index in range(3):
        two.submit(index)
    assert two.outcomes == [Tokens(index, 0, (RowTokens((3,)),)) for index in range(3)]
    assert two.here.waiting == 0


@pytest.mark.parametrize(
    ("refill", "ran"),
    [((1,), [[0], [0, 1], [0]]), ((0,), [[0, 1], [0], [0]]), ((0, 1), [[0, 1], [0, 1], [0]])],
)
def test_the_others_pass_on_what_they_sent(refill: tuple[int, ...], ran: list[list[int]]) -> None:
    two = Two()
    two.submit(0)
    two.submit(1, refill=refill)
    assert [stage.ran for stage in two.stages] == ran
    assert set(two.stages[1].saw) == {1.0}
    assert two.outcomes[1] == Tokens(1, 0, (RowTokens(),))


@pytest.mark.parametrize(("refill", "body"), [((1,), None), ((0,), torch.zeros(1, HIDDEN))])
def test_who_computes_again_needs_the_activation_and_nobody_else(refill: tuple[int, ...], body: Tensor | None) -> None:
    with pytest.raises(MalformedMessage, match="missing, or nobody wants one"):
        Two().there.take_step(step_frame(SESSION, 1, 0, replace(make_step(0), refill=refill), body))


def test_a_journal_finds_rows_by_slot_and_position() -> None:
    journal = Journal(slots=3, context=8)

    def step(contexts: list[int], counts: list[int], slots: list[int]) -> Step:
        starts = numpy.concatenate([[0], numpy.cumsum(counts)]).astype(numpy.int32)
        ids = numpy.zeros(starts[-1], numpy.int32)
        return replace(
            make_step(0), token_ids=ids, query_starts=starts, context_lengths=numpy.array(contexts, numpy.int32),
            slots=numpy.array(slots, numpy.int32),
        )  # fmt: skip

    journal.keep(step([0, 2], [5, 3], [2, 0]), torch.arange(8.0).view(8, 1))
    journal.keep(step([5, 5], [1, 1], [0, 2]), torch.tensor([[50.0], [52.0]]))
    assert journal.read(step([3], [3], [0])).flatten().tolist() == [6, 7, 50]
    assert journal.read(step([4, 2], [2, 1], [2, 0])).flatten().tolist() == [4, 52, 5]


def test_duplicates_run_once() -> None:
    two = Two()
    two.network.tamper = lambda parts: [parts, parts]
    two.submit(0)
    two.submit(1)
    assert [stage.ran for stage in two.stages] == [[0, 1]] * 3
    assert two.verdicts.count("repeated") == 4
    assert len(two.outcomes) == 2


def test_what_follows_a_lost_step_does_not_run() -> None:
    two = Two()
    two.network.tamper = lambda parts: []
    two.submit(0)
    assert two.here.waiting == 1
    two.network.tamper = lambda parts: [parts]
    two.submit(1)
    assert two.verdicts == ["gap"]
    assert two.stages[1].ran == []
    two.submit(2, epoch=1)
    assert two.outcomes == [Tokens(2, 1, (RowTokens((3,)),))]


def test_an_older_epoch_is_shut_out() -> None:
    two = Two()
    held: list[list[bytes]] = []
    two.network.tamper = lambda parts: held.append(parts) or []
    two.submit(0)
    two.network.tamper = lambda parts: [parts]
    two.submit(1, epoch=1)
    two.network.tamper = lambda parts: [parts, *held]
    two.submit(2, epoch=1)
    assert two.verdicts.count("stale") == 1
    assert two.stages[1].ran == [1, 2]
    assert two.outcomes == [Tokens(index, 1, (RowTokens((3,)),)) for index in (1, 2)]
    assert two.here.waiting == 0


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_follows_a_step_that_failed_goes_nowhere_and_no_step_seems_lost(stage: int) -> None:
    """Steps behind it were under way already; each process would take them for what follows a step that was lost."""
    two = Two()
    run, fails = two.stages[stage].run, [True]

    def once(step: Step, incoming: Tensor | None) -> Tensor | Tokens:
        if step.index == 1 and fails.pop():
            raise StageError("planted")
        return run(step, incoming)

    two.stages[stage].run = once  # type: ignore[method-assign]
    for index in range(4):
        two.submit(index)
    assert "gap" not in two.verdicts
    assert two.stages[stage].ran == [0]
    assert [type(outcome) for outcome in two.outcomes] == [Tokens, Failure]
    two.submit(4, epoch=1)
    assert two.outcomes[2:] == [Tokens(4, 1, (RowTokens((3,)),))]


def test_a_process_to_which_no_tokens_come_back_notes_no_steps() -> None:
    two = Two()
    for index in range(50):
        two.submit(index)
    assert not two.there._rows
    assert not two.here._rows


def test_a_failure_settles_all_that_is_under_way() -> None:
    two = Two()
    two.network.tamper = lambda parts: []
    two.submit(0)
    assert two.here.waiting == 1
    two.submit(1, token=99)
    assert isinstance(two.outcomes[0], Failure)
    assert two.here.waiting == 0


@pytest.mark.parametrize(
    ("stage", "activation"),
    [(7, torch.zeros(1, HIDDEN)), (0, None), (1, None), (2, torch.zeros(1, HIDDEN))],
    ids=["no such stage", "the first stage is elsewhere", "no activation", "the last stage is elsewhere"],
)
def test_a_step_for_somebody_else_is_malformed(stage: int, activation: Tensor | None) -> None:
    two = Two()
    with pytest.raises(MalformedMessage):
        two.there.take_step(step_frame(SESSION, stage, 0, make_step(0), activation))
