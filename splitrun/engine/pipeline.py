"""Steps through the stages: each device's worker runs its stages' share of a step and hands the activation on.

A stage may be in another process: then its link sends the step there, and ``arrived`` takes up what comes back. Knows
the order of stages and nothing of requests or sockets. Results arrive in the order in which steps were submitted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from splitrun.engine.link import LESS, EagerStage, Elsewhere, Link, RemoteLink, RestorableStage
from splitrun.engine.outcome import Failure, Outcome
from splitrun.engine.record import Record, Span, StageClock
from splitrun.errors import DeviceOutOfMemory, SplitrunError, StageLost, StageTimeout
from splitrun.schedule.scheduler import Held
from splitrun.schedule.step import RowTokens, Step, Tokens
from splitrun.transport.journal import Journal
from splitrun.transport.local import Parcel
from splitrun.transport.messages import KVRows

MEMORY_IS_OUT = ("out of memory", "allocate memory", "ALLOC_FAILED")
CLOSING_S = 30.0
"""How long closing waits for a stage that computes."""


class Pipeline:
    """Stages in a row. ``deliver`` is called from any thread with each step's Tokens or Failure.

    ``elsewhere`` is closed with the pipeline. ``after`` is called on a stage's worker behind each of its steps, when
    what came of it is on its way. ``journals``: stage in another process -> what is kept of what it is sent.
    ``at_work``, to be set, is called when a stage here begins what takes long: others have time then.
    """

    def __init__(
        self,
        links: Sequence[Link | RemoteLink],
        deliver: Callable[[Outcome], None],
        elsewhere: Elsewhere | None = None,
        after: Callable[[int, Step], None] | None = None,
        journals: Mapping[int, Journal] | None = None,
    ) -> None:
        self._set_links(links)
        self._deliver = deliver
        self._elsewhere = elsewhere
        self._after = after
        self._journals = journals or {}
        self.at_work: Callable[[], None] = _nothing
        self._closing = threading.Event()
        self._preparing = threading.Lock()
        self._begun = 0
        self._ended = 0
        self._failed = (-1, 0)  # the newest epoch and the first step of it that failed here
        self._lock = threading.Lock()
        self.clocks = tuple(StageClock() for _ in self._links)
        self.record = Record()

    def _set_links(self, links: Sequence[Link | RemoteLink]) -> None:
        self._links = tuple(links)
        self._local = tuple(link for link in self._links if isinstance(link, Link))
        self._eager = tuple(link.stage for link in self._local if isinstance(link.stage, EagerStage))

    def submit(self, step: Step) -> None:
        """Send a step on its way; returns at once."""
        self._post(0, step, None)

    def prepare(self, step: Step) -> None:
        """Let the stages here make ready for a step that is expected; see `EagerStage.prepare`."""
        with self._preparing:
            for stage in () if self._closing.is_set() else self._eager:
                with suppress(Exception):  # of a stage that fails, the step itself tells
                    stage.prepare(step)

    def begin(self, requests: Collection[int]) -> None:
        """These requests are about to run: what is kept for the case of a loss is kept of them."""
        if self._elsewhere is not None:
            self._elsewhere.begin(requests)

    def forget(self, request: int) -> None:
        """Keep nothing of a request that has ended."""
        if self._elsewhere is not None:
            self._elsewhere.forget(request)

    def kept_bytes(self, index: int) -> int:
        """Bytes kept in this process for the case that a stage is lost: its KV, and what it was sent."""
        journal = self._journals.get(index)
        sent = 0 if journal is None else journal.nbytes
        return sent + (0 if self._elsewhere is None else self._elsewhere.kept_bytes(index))

    def restore(self, loss: int, held: Iterable[Held]) -> None:
        """After ``Restarted``: give the new stages KV of what the others hold. ``Resumed`` follows, soon or later."""
        if self._elsewhere is not None:
            self._elsewhere.restore(loss, held)

    def restore_here(
        self, index: int, kv: KVRows, placed: Callable[[], None], failed: Callable[[Exception], None]
    ) -> None:
        """Put KV into its place in a stage of this process; ``placed`` or ``failed`` is called behind it."""
        link = self._links[index]
        assert isinstance(link, Link), f"{link.name} is elsewhere"
        stage = link.stage
        assert isinstance(stage, RestorableStage), f"{link.name} keeps no KV"

        def place() -> None:
            stage.restore(kv.tables, kv.start, kv.rows)
            placed()

        link.worker.post(place, failed)

    def relink(self, links: Sequence[Link | RemoteLink], journals: Mapping[int, Journal]) -> None:
        """Go on with these links: the same stages, some of which have come from elsewhere. ``journals``: those that the
        new links need; what is kept already stays. Nothing may run meanwhile but steps of an epoch that has ended."""
        assert len(links) == len(self._links), "stages change their place, not their number"
        self._set_links(links)
        self._journals = {**journals, **self._journals}

    def work(self, index: int, task: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        """Run something on the worker of a stage that is here."""
        link = self._links[index]
        assert isinstance(link, Link), f"{link.name} is elsewhere"
        link.worker.post(task, failed)

    def arrived(self, index: int, step: Step, activation: Tensor | None) -> None:
        """Go on with a step that a stage in another process has brought to stage ``index``, which is here."""
        before = self._links[index - 1].onward if index else None
        self._post(index, step, before.send(activation) if before is not None and activation is not None else None)

    @property
    def links(self) -> tuple[Link | RemoteLink, ...]:
        """The stages in their places."""
        return self._links

    @property
    def leaves_time(self) -> bool:
        """Whether a processor has time for others while stages compute: all are here, and a card's is among them."""
        cards = any(not link.worker.device.startswith("cpu") for link in self._local)
        return cards and len(self._local) == len(self._links)

    @property
    def alive(self) -> bool:
        """Whether every worker runs."""
        return all(link.worker.alive for link in self._local) and (self._elsewhere is None or self._elsewhere.alive)

    @property
    def busy(self) -> bool:
        """Whether a stage of this process computes, or is about to."""
        return self._begun > self._ended

    def close(self) -> None:
        """Let steps in flight go, close the stages on their own workers, and end the workers. One that is stuck for
        CLOSING_S is left behind. May be called twice."""
        if self._closing.is_set():
            return
        with self._preparing:
            self._closing.set()
        if self._elsewhere is not None:
            self._elsewhere.close()
        for link in self._local:
            with suppress(StageTimeout):
                link.worker.call(link.stage.close, CLOSING_S)
        for worker in {id(link.worker): link.worker for link in self._local}.values():
            worker.close(CLOSING_S)

    def _post(self, index: int, step: Step, parcel: Parcel | None) -> None:
        link = self._links[index]
        relief = link.relief if isinstance(link, Link) else LESS

        def failed(error: Exception) -> None:
            self._note_failure(step)
            if memory_is_out(error):
                torch.cuda.empty_cache()  # what is left in pieces may fit as a whole
            self._deliver(Failure(step.index, step.epoch, translated(error, link.name, relief)))

        if isinstance(link, Link):

            def task() -> Callable[[], None] | None:
                return self._run(index, link, step, parcel)

            alone = self._count(index, begun=1) == 1
            if not (alone and link.stage.any_thread(step) and link.worker.run_here(task, failed)):
                link.worker.post(task, failed)
            return
        try:
            self._send(index, link, step, parcel)
        except SplitrunError as error:
            failed(error)

    def _send(self, index: int, link: RemoteLink, step: Step, parcel: Parcel | None) -> None:
        """Send a step to another process, with what was kept for it where the stage before has only passed it on."""
        journal = self._journals.get(index)
        activation = self._received(index, parcel)
        if step.refill and index not in step.refill:
            link.send(step, None)
        elif self._passed_on(index, step):
            assert journal is not None, f"nothing was kept for {link.name}"
            link.send(step, journal.read(step))
        else:
            link.send(step, activation)
        if journal is not None and activation is not None:
            journal.keep(step, activation)

    def _arriving(self, index: int, step: Step, parcel: Parcel | None) -> Tensor | None:
        """The activation for a stage here: what was kept of it where the stage before has only passed the step on.

        One that was elsewhere before has a journal; it is kept up, because the stage behind may be lost next."""
        journal = self._journals.get(index)
        if journal is None:
            return self._received(index, parcel)
        if parcel is None and self._passed_on(index, step):
            hop = self._links[index - 1].onward
            assert hop is not None, "a stage with another behind it has a hop"
            return self._received(index, hop.send(journal.read(step)))
        activation = self._received(index, parcel)
        if activation is not None:
            journal.keep(step, activation.to("cpu"))
        return activation

    def _passed_on(self, index: int, step: Step) -> bool:
        """Whether the stage before has not computed the step."""
        return bool(index) and bool(step.refill) and index - 1 not in step.refill

    def _received(self, index: int, parcel: Parcel | None) -> Tensor | None:
        """The activation for stage ``index``, None for the first stage."""
        arriving = self._links[index - 1].onward if index else None
        return arriving.receive(parcel) if arriving is not None and parcel is not None else None

    def _run(self, index: int, link: Link, step: Step, parcel: Parcel | None) -> Callable[[], None] | None:
        """One stage's share of a step, on the stage's worker or a thread lent to it; returns what sends the step on."""
        result: Parcel | Tokens | None = None
        passed = bool(step.refill) and index not in step.refill
        wanted = not self._closing.is_set() and not self._in_vain(step)
        try:
            if wanted and not passed:
                result = self._compute(index, link, step, parcel)
        finally:
            self._count(index, ended=1)
        if wanted and passed:
            return partial(self._pass, index, step)
        return None if result is None else partial(self._hand_on, index, step, result)

    def _note_failure(self, step: Step) -> None:
        with self._lock:
            epoch, first = self._failed
            if step.epoch > epoch or (step.epoch == epoch and step.index < first):
                self._failed = (step.epoch, step.index)

    def _in_vain(self, step: Step) -> bool:
        """Whether a step before it has failed here, which ends the epoch: sent on, it would be taken for one behind a
        step that was lost on its way."""
        epoch, first = self._failed
        return step.epoch == epoch and step.index > first

    def _count(self, index: int, *, begun: int = 0, ended: int = 0) -> int:
        """Count shares of steps; returns how many are under way in this process."""
        with self._lock:
            self.clocks[index].queued += begun - ended
            self._begun += begun
            self._ended += ended
            return self._begun - self._ended

    def _compute(self, index: int, link: Link, step: Step, parcel: Parcel | None) -> Parcel | Tokens:
        if link.onward is None or not link.stage.any_thread(step):
            self.at_work()
        started_s = time.monotonic()
        result = link.stage.run(step, self._arriving(index, step, parcel))
        if isinstance(result, Tokens):
            self._note(index, step, started_s)
            return result
        assert link.onward is not None, f"{link.name} has no head and no stage behind it"
        onward = link.onward.send(result)
        self.clocks[index].sent_bytes += result.nbytes
        self._note(index, step, started_s)
        return onward

    def _hand_on(self, index: int, step: Step, result: Parcel | Tokens) -> None:
        """Send what came of a stage's share where it goes."""
        if isinstance(result, Tokens):
            self._deliver(result)
        else:
            self._post(index + 1, step, result)
        if self._after is not None:
            self._after(index, step)

    def _pass(self, index: int, step: Step) -> None:
        """Go on with a step that other stages compute. None of its tokens is new."""
        if index + 1 < len(self._links):
            self._post(index + 1, step, None)
        else:
            self._deliver(Tokens(step.index, step.epoch, (RowTokens(),) * step.rows))

    def _note(self, index: int, step: Step, started_s: float) -> None:
        seconds = time.monotonic() - started_s
        self.clocks[index].add(seconds, len(step.token_ids))
        self.record.add(Span(index, step.index, step.epoch, len(step.token_ids), step.requests, started_s, seconds))


def _nothing() -> None:
    """Nobody waits for time."""


def memory_is_out(error: Exception) -> bool:
    """Whether a device was full: torch has an exception of its own for its allocator alone, not for what the driver,
    cuBLAS or a kernel's loading says."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error) for sign in MEMORY_IS_OUT)


def translated(error: Exception, name: str, relief: str = LESS) -> SplitrunError:
    """An error of a stage as one of ours, naming the stage; ``relief`` is what to plan with when memory is out."""
    if isinstance(error, SplitrunError):
        return error
    reason = str(error).strip().split("\n")[0][:200]
    if memory_is_out(error):
        return DeviceOutOfMemory(f"{name} ran out of memory: plan again with {relief}")
    return StageLost(f"{name} failed: {type(error).__name__}: {reason}")
