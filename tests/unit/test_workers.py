"""Workers: tasks in order, one at a time, and on another worker's thread where handing over would take longer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from functools import partial

import numpy
import pytest
import torch
from torch import Tensor

from splitrun.engine.core import EngineCore
from splitrun.engine.interface import StageStatus
from splitrun.engine.lineup import Line
from splitrun.engine.link import Link, RemoteLink
from splitrun.engine.outbox import Outbox
from splitrun.engine.outcome import Failure, Outcome
from splitrun.engine.pipeline import Pipeline
from splitrun.schedule.request import Request, SamplingParams, TokenEvent
from splitrun.schedule.scheduler import GroupSpec, Limits, Scheduler
from splitrun.schedule.step import RowSampling, RowTokens, Step, Tokens
from splitrun.transport.local import SameMemory, Worker

PATIENCE_S = 10.0


class Fault(Exception):
    """What a task of these tests raises."""


@pytest.fixture
def workers() -> Iterator[tuple[Worker, Worker]]:
    """A processor's worker and an accelerator's."""
    processor, card = Worker("cpu"), Worker("xpu:0")
    for worker in (processor, card):
        worker.call(lambda: None)
    yield processor, card
    processor.close()
    card.close()


def lend(caller: Worker, target: Worker) -> tuple[bool, str | None]:
    """Whether the target's task ran on the caller's thread, and the name of the thread it ran on."""
    ran: list[str] = []

    def ask() -> bool:
        return target.run_here(lambda: ran.append(threading.current_thread().name), lambda error: None)

    return caller.call(ask), ran[0] if ran else None


def test_a_processors_worker_lends_its_thread(workers: tuple[Worker, Worker]) -> None:
    processor, card = workers
    assert lend(processor, card) == (True, "splitrun cpu")


def test_a_card_does_not_compute_for_the_processor(workers: tuple[Worker, Worker]) -> None:
    processor, card = workers
    assert lend(card, processor) == (False, None)


def test_threads_that_are_no_workers_lend_nothing(workers: tuple[Worker, Worker]) -> None:
    _, card = workers
    assert not card.run_here(lambda: None, lambda error: None)


def test_a_worker_with_something_to_do_keeps_its_order(workers: tuple[Worker, Worker]) -> None:
    processor, card = workers
    begun, go_on = threading.Event(), threading.Event()

    def busy() -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)

    card.post(busy, lambda error: None)
    assert begun.wait(PATIENCE_S)
    assert lend(processor, card) == (False, None)
    go_on.set()
    card.call(lambda: None, PATIENCE_S)
    assert lend(processor, card)[0]


def test_a_posted_task_waits_for_one_on_a_lent_thread(workers: tuple[Worker, Worker]) -> None:
    processor, card = workers
    order: list[str] = []
    posted = threading.Event()

    def then() -> None:
        order.append("posted")
        posted.set()

    def lent() -> None:
        card.post(then, lambda error: None)
        assert not posted.wait(0.05)
        order.append("lent")

    assert processor.call(lambda: card.run_here(lent, lambda error: order.append(str(error))))
    assert posted.wait(PATIENCE_S)
    assert order == ["lent", "posted"]


def test_a_fault_on_a_lent_thread_is_told_and_ends_nothing(workers: tuple[Worker, Worker]) -> None:
    processor, card = workers
    told: list[Exception] = []

    def fail() -> None:
        raise Fault

    assert processor.call(lambda: card.run_here(fail, told.append))
    assert [type(error) for error in told] == [Fault]
    assert lend(processor, card)[0]


def test_a_device_that_cannot_be_set_up_is_told_to_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise Fault

    monkeypatch.setattr(torch.cuda, "set_device", fail)
    worker = Worker("cuda:0")
    for _ in range(2):
        with pytest.raises(Fault):
            worker.call(lambda: None, PATIENCE_S)
    worker.close()


class ThreadStage:
    """Notes the thread that runs it; waits at ``gate`` when there is one."""

    def __init__(self, head: bool = False, gate: threading.Event | None = None) -> None:
        self.threads: list[str] = []
        self.begun = threading.Event()
        self._head = head
        self._gate = gate

    def any_thread(self, step: Step) -> bool:
        return True

    def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
        self.threads.append(threading.current_thread().name)
        self.begun.set()
        if self._gate is not None:
            assert self._gate.wait(PATIENCE_S)
        return Tokens(step.index, step.epoch, (RowTokens((1,)),)) if self._head else torch.zeros(1, 1)

    def close(self) -> None:
        pass


class EagerThreadStage(ThreadStage):
    """Notes what it is asked to make ready for, and what comes."""

    def __init__(self, head: bool = False, told: list[str] | None = None) -> None:
        super().__init__(head)
        self.expected: list[Step] = []
        self.steps: dict[int, Step] = {}
        self._told = told if told is not None else []

    def prepare(self, step: Step) -> None:
        self.expected.append(step)

    def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
        self._told.append("run")
        self.steps[step.index] = step
        return super().run(step, incoming)


def step(index: int) -> Step:
    one = numpy.ones(1, numpy.int32)
    wanted = (RowSampling(SamplingParams(), 0, 0),)
    return Step(index, 0, one, numpy.array([0, 1], numpy.int32), one, one, {}, wanted, (None,))


def pipeline_of(workers: tuple[Worker, Worker], stages: list[ThreadStage], came: list[Outcome]) -> Pipeline:
    processor, card = workers
    hop = SameMemory()
    links = [
        Link(stages[0], processor, "a", hop),
        Link(stages[1], card, "b", hop),
        Link(stages[2], processor, "c", None),
    ]
    return Pipeline(links, came.append)


def test_a_step_alone_stays_on_the_thread_that_has_it(workers: tuple[Worker, Worker]) -> None:
    stages = [ThreadStage(), ThreadStage(), ThreadStage(head=True)]
    came: list[Outcome] = []
    pipeline = pipeline_of(workers, stages, came)
    pipeline.submit(step(0))
    for _ in range(3):  # a task behind each of the step's three
        workers[0].call(lambda: None, PATIENCE_S)
    assert [stage.threads for stage in stages] == [["splitrun cpu"]] * 3
    assert [type(outcome) for outcome in came] == [Tokens]
    assert not pipeline.busy


def test_steps_are_drafted_where_a_card_leaves_the_processor_time(workers: tuple[Worker, Worker]) -> None:
    processor, card = workers
    mine, last = Link(ThreadStage(), processor, "", SameMemory()), Link(ThreadStage(head=True), processor, "", None)
    on_card = Link(ThreadStage(), card, "", SameMemory())
    elsewhere = RemoteLink("", lambda step, activation: None, SameMemory())
    found = [
        Pipeline(links, print).leaves_time for links in ([mine, on_card, last], [mine, last], [on_card, elsewhere])
    ]
    assert found == [True, False, False]


@pytest.mark.parametrize(("device", "drafted"), [("xpu:0", True), ("cpu", False)])
def test_the_engine_drafts_there_alone(device: str, drafted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = EagerThreadStage(head=True)
    links = [Link(stage, Worker(device), "", None)]
    limits = Limits(context=64, sessions=1, vocabulary=2, chunk_tokens=64, block_tokens=64, depth=1)
    line = Line(partial(Pipeline, links), (StageStatus(device, ""),), {}, lambda: None)
    core = EngineCore(Scheduler((GroupSpec("full", None, 1),), limits), line)
    ended = threading.Event()
    sampling = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    core.submit(Request(1, (1,), sampling), lambda event: ended.set() if event.finish_reason else None)
    assert ended.wait(PATIENCE_S)
    core.close()
    assert bool(stage.expected) == drafted
    assert all(step is stage.steps.get(step.index, step) for step in stage.expected)  # the same object comes


def test_the_loop_wakes_when_the_card_has_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are handed out while the card computes, not while its work is being launched."""
    processor, card = Worker("cpu"), Worker("xpu:0")
    happened: list[str] = []
    embed, middle, head = (EagerThreadStage(head=head, told=happened) for head in (False, False, True))
    places = ((embed, processor), (middle, card), (head, processor))
    links = [Link(stage, worker, "", SameMemory() if stage is not head else None) for stage, worker in places]
    limits = Limits(context=64, sessions=1, vocabulary=2, chunk_tokens=64, block_tokens=64, depth=1)
    wake = EngineCore._wake
    monkeypatch.setattr(EngineCore, "_wake", lambda self: (happened.append("wake"), wake(self))[1])
    line = Line(partial(Pipeline, links), (StageStatus("", ""),) * 3, {}, lambda: None)
    core = EngineCore(Scheduler((GroupSpec("full", None, 1),), limits), line)
    events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    sampling = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    core.submit(Request(1, (1,), sampling), events.put)
    found = [events.get(timeout=PATIENCE_S) for _ in range(5)]
    core.close()
    assert found[-1].finish_reason == "length"
    assert happened == ["run", "run", "wake", "run"] * 5


def test_tokens_do_not_wait_for_a_step_that_waits_behind_another() -> None:
    """One stream's token is handed out while the processor is busy with another's step for long."""
    go_on, begun = threading.Event(), threading.Event()
    slow = [False]

    class Layers(ThreadStage):
        def any_thread(self, step: Step) -> bool:
            return False

        def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
            if slow[0] and 2 in step.requests:
                begun.set()
                assert go_on.wait(PATIENCE_S)
            return torch.zeros(len(step.token_ids), 1)

    class Head(ThreadStage):
        def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
            if slow[0] and step.requests == (1,):
                begun.wait(0.2)  # at some time the processor has the other stream's step
            return Tokens(step.index, step.epoch, tuple(RowTokens((1,)) for _ in step.sampling))

    links = [Link(Layers(), Worker("cpu"), "", SameMemory()), Link(Head(), Worker("xpu:0"), "", None)]
    limits = Limits(context=512, sessions=2, vocabulary=2, chunk_tokens=64, block_tokens=64, depth=2, streams=2)
    line = Line(partial(Pipeline, links), (StageStatus("", ""),) * 2, {}, lambda: None)
    core = EngineCore(Scheduler((GroupSpec("full", None, 16),), limits), line)
    events: dict[int, queue.SimpleQueue[TokenEvent]] = {1: queue.SimpleQueue(), 2: queue.SimpleQueue()}
    for request_id, came in events.items():
        core.submit(Request(request_id, (1,), SamplingParams(temperature=0.0, ignore_eos=True)), came.put)
        came.get(timeout=PATIENCE_S)
    slow[0] = True
    assert begun.wait(PATIENCE_S)
    time.sleep(0.5)
    with core._lock:
        waiting = list(core._receivers._due)
    go_on.set()
    core.close()
    assert not waiting


def test_nothing_is_prepared_once_the_stages_are_closed() -> None:
    stage, worker = EagerThreadStage(), Worker("xpu:0")
    pipeline = Pipeline([Link(stage, worker, "", None)], print)
    pipeline.prepare(step(0))
    pipeline.close()
    pipeline.prepare(step(1))
    assert [one.index for one in stage.expected] == [0]


def test_a_stage_that_cannot_prepare_is_told_of_by_its_step(workers: tuple[Worker, Worker]) -> None:
    class Faulty(EagerThreadStage):
        def prepare(self, step: Step) -> None:
            raise Fault

        def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
            raise Fault

    came: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    pipeline = Pipeline([Link(Faulty(), workers[1], "a stage", None)], came.put)
    pipeline.prepare(step(0))
    pipeline.submit(step(0))
    assert isinstance(came.get(timeout=PATIENCE_S), Failure)


def test_stages_of_one_card_follow_each_other_on_a_lent_thread(workers: tuple[Worker, Worker]) -> None:
    processor, card = workers
    stages = [ThreadStage(), ThreadStage(), ThreadStage(head=True)]
    places = (card, card, processor)
    links = [Link(stage, place, "", SameMemory()) for stage, place in zip(stages, places, strict=True)]
    came: list[Outcome] = []
    pipeline = Pipeline(links, came.append)
    processor.call(lambda: pipeline.submit(step(0)), PATIENCE_S)
    processor.call(lambda: None, PATIENCE_S)
    assert [stage.threads for stage in stages] == [["splitrun cpu"]] * 3


def test_of_two_steps_each_device_runs_its_own(workers: tuple[Worker, Worker]) -> None:
    gate = threading.Event()
    stages = [ThreadStage(), ThreadStage(gate=gate), ThreadStage(head=True)]
    came: list[Outcome] = []
    pipeline = pipeline_of(workers, stages, came)
    held = threading.Event()

    def hold() -> None:
        assert held.wait(PATIENCE_S)

    workers[0].post(hold, lambda error: None)
    pipeline.submit(step(0))
    pipeline.submit(step(1))
    held.set()
    assert stages[1].begun.wait(PATIENCE_S)
    workers[0].call(lambda: None, PATIENCE_S)
    assert stages[0].threads == ["splitrun cpu"] * 2, "the processor waits for the card"
    gate.set()
    workers[1].call(lambda: None, PATIENCE_S)
    workers[0].call(lambda: None, PATIENCE_S)
    assert stages[1].threads == ["splitrun xpu:0"] * 2
    assert [outcome.step for outcome in came if isinstance(outcome, Tokens)] == [0, 1]


def test_steps_leave_in_order_whoever_sends_them() -> None:
    outbox, sent = Outbox(), list[int]()
    inside, go_on = threading.Event(), threading.Event()

    def slowly(one: Step) -> None:
        inside.set()
        assert go_on.wait(PATIENCE_S)
        sent.append(one.index)

    outbox.add(step(0))
    first = threading.Thread(target=outbox.send, args=(slowly,))
    first.start()
    assert inside.wait(PATIENCE_S)
    outbox.add(step(1))
    outbox.send(lambda one: sent.append(-one.index))
    assert sent == [], "the second overtakes the first"
    go_on.set()
    first.join(PATIENCE_S)
    assert sent == [0, 1]
