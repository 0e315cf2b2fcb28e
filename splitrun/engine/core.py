"""The engine: one loop that schedules steps, sends them through the pipeline and hands out the tokens.

Token ids in, token events out; text is somebody else's business. Requests may come from any thread. A step that a
stage cannot finish costs the requests in it, or the newest of them when a device was full; all others go on where they
were.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from splitrun.engine.interface import BlockUse, EngineStatus
from splitrun.engine.lineup import Line
from splitrun.engine.outbox import Outbox
from splitrun.engine.outcome import Failure, Interruption, Outcome, Restarted, Resumed
from splitrun.engine.pipeline import Pipeline
from splitrun.engine.receivers import Deliver, Receivers
from splitrun.engine.record import Span
from splitrun.errors import DeviceOutOfMemory, InvalidRequest, QueueFull, SplitrunError, StageLost
from splitrun.schedule.limits import check_request
from splitrun.schedule.request import Request, SamplingParams, TokenEvent
from splitrun.schedule.scheduler import Scheduler
from splitrun.schedule.step import Step, Tokens


class _Broken:
    """A worker met a fault of our own while it committed tokens."""


Message = Outcome | _Broken
"""What came back from the stages."""
_WARM_UP_ID = -1
_WARM_UP = Request(_WARM_UP_ID, (0,), SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
_BUG = "the engine's loop ended on an internal error: start the server again"


class EngineCore:
    """Implements `splitrun.engine.interface.TokenEngine` over a scheduler and a pipeline.

    ``line`` has the loaded stages; `replace` puts others in their place.
    """

    def __init__(self, scheduler: Scheduler, line: Line) -> None:
        self._scheduler = scheduler
        self._line = line
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._receivers = Receivers(self._lock, self.cancel)
        self._outbox = Outbox()
        self._reason = "no token has gone through the stages yet"
        self._draining = self._paused = self._closed = self._replacing = False
        self._owed = False
        self._lost = ""
        self.closed = threading.Event()
        self._process = os.getpid()
        self._prompt_tokens = self._completion_tokens = 0
        self._pipeline = self._pipeline_of(line)
        self._thread = threading.Thread(target=self._loop, name="splitrun engine", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int:
        """Tokens that one sequence may hold."""
        return self._scheduler.capacity

    @property
    def vocabulary(self) -> int:
        """Token ids run from 0 to this number, exclusive."""
        return self._scheduler.limits.vocabulary

    @property
    def pipeline(self) -> Pipeline:
        """The stages as they are now, for whoever measures them; `replace` puts another in its place."""
        return self._pipeline

    def show(self, line: Line) -> None:
        """The status is of these stages from now on: some have been taken over."""
        with self._lock:
            self._line = line

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queue a request; see TokenEngine."""
        if os.getpid() != self._process:
            raise StageLost(f"this engine belongs to process {self._process}, which forked this one: make another here")
        with self._lock:
            if self._lost:
                raise StageLost(self._lost)
            if self._closed or self._draining:
                raise StageLost("the engine is shutting down: send the request to another server, or again later")
            self._scheduler.submit(request)
            self._receivers.add(request.request_id, deliver)
            self._prompt_tokens += len(request.prompt) if request is not _WARM_UP else 0
        self._inbox.put(None)

    def check(self, request: Request) -> None:
        """Raise what ``submit`` would raise because of the request itself, without queueing it."""
        check_request(request, self._scheduler.limits, self._scheduler.capacity)

    def cancel(self, request_id: int) -> None:
        """Forget a request; see TokenEngine."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._receivers.remove(request_id)
            self._scheduler.cancel(request_id)
            self._pipeline.forget(request_id)
            self._idle.notify_all()
        self._inbox.put(None)

    def warm_up(self, timeout_s: float = 600.0) -> None:
        """Send one real token through all stages. Raises what the stages raise, or StageLost after the timeout."""
        done: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self.submit(_WARM_UP, done.put)
        try:
            event = done.get(timeout=timeout_s)
        except queue.Empty:
            raise StageLost(f"no token came through the stages within {timeout_s:.0f} s") from None
        if event.finish_reason == "error":
            raise StageLost(event.error or "a stage failed")

    def status(self) -> EngineStatus:
        """How the engine does now; see TokenEngine."""
        with self._lock:
            statistics = self._scheduler.statistics()
            stages = tuple(
                clock.shown(stage, self._pipeline.kept_bytes(index))
                for index, (stage, clock) in enumerate(zip(self._line.stages, self._pipeline.clocks, strict=True))
            )
            reason = self._reason or ("" if self._pipeline.alive and self._thread.is_alive() else "a worker has died")
            return EngineStatus(
                healthy=not reason and not self._closed,
                reason="the engine is closed" if self._closed else reason,
                context=self.context,
                vocabulary=self.vocabulary,
                running=statistics.running,
                waiting=statistics.waiting,
                blocks={name: BlockUse(used, total) for name, (used, total) in statistics.blocks.items()},
                preemptions=statistics.preemptions,
                prompt_tokens=self._prompt_tokens,
                completion_tokens=self._completion_tokens,
                stages=stages,
                placement=dict(self._line.placement),
                epoch=self._scheduler.epoch,
            )

    def take_spans(self) -> list[Span]:
        """What stages did since the last time; those elsewhere tell with their heartbeats, if asked to trace."""
        return self._pipeline.record.take()

    def drain(self) -> None:
        """Refuse new requests and return when the running ones have ended."""
        with self._idle:
            self._draining = True
            self._idle.wait_for(lambda: self._closed or not self._scheduler.has_work)

    def close(self) -> None:
        """End every request, close the stages and free their memory. In a forked process they are not its own."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._owe(self._scheduler.fail_all("the engine shut down and ended this request: send it again later"))
            self._idle.notify_all()
            self.closed.set()
            self._idle.wait_for(lambda: not self._replacing)
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._receivers.hand_out()
        self._pipeline.close()

    def replace(self, reason: str, rebuild: Callable[[], Line]) -> None:
        """Close all stages, go on with those that ``rebuild`` brings up, and compute everything known again there.

        Runs on the calling thread. When ``rebuild`` raises a SplitrunError, every request ends with it.
        """
        with self._lock:
            if self._closed or self._lost:
                return
            self._replacing = self._paused = True
            self._reason = reason
            self._scheduler.recompute_all()
        self._inbox.put(None)  # tokens that were to be handed out once the next step had begun
        self._pipeline.close()
        try:
            line = rebuild()
            with self._lock:
                if self._closed:
                    line.close()
                    return
                self._line, self._pipeline = line, self._pipeline_of(line)
                self._scheduler.recompute_all()
            self._inbox.put(Resumed())
        except SplitrunError as error:
            self._inbox.put(Interruption(StageLost(f"{reason}: {error}"), final=True))
        finally:
            with self._idle:
                self._replacing = False
                self._idle.notify_all()

    def _pipeline_of(self, line: Line) -> Pipeline:
        pipeline = line.make_pipeline(self._come_back)
        pipeline.at_work = self._wake
        return pipeline

    def _come_back(self, message: Outcome) -> None:
        """Take what stages send back. The next step after tokens is sent off at once, by the worker that made them or
        the mailbox that got them: the loop would have to wake up first. It hands them out meanwhile. Two threads of one
        interpreter stand in each other's way, so where a card has work to be launched the loop is woken behind that.
        """
        if not isinstance(message, Tokens):
            self._inbox.put(message)
            return
        well = later = False
        try:
            with self._lock:
                self._owed = self._pipeline.leaves_time  # before there is a step that somebody might begin
                taken = self._take_up(message)
                alone = self._scheduler.in_flight == 1  # else the next step may wait long behind others
                self._owed = later = self._owed and taken and alone and self._outbox.holds_steps
            self._outbox.send(self._submit)
            well = True
        finally:
            if not well:
                self._inbox.put(_Broken())
        if not later:
            self._inbox.put(None if taken else message)

    def _wake(self) -> None:
        """Wake the loop if it has been left asleep: the stages have begun what takes them longer."""
        if self._owed:
            self._owed = False
            self._inbox.put(None)

    def _take_up(self, message: Tokens) -> bool:
        """Commit tokens and line up the next step, if it is their turn. Called under the lock."""
        if self._closed or self._paused or self._scheduler.next_commit != (message.epoch, message.step):
            return False
        self._reason = ""
        self._owe(self._scheduler.commit(message))
        self._line_up_steps()
        if not self._scheduler.has_work:
            self._idle.notify_all()
        return True

    def _line_up_steps(self) -> None:
        """Put all steps that can run into the outbox. Called under the lock."""
        while not self._closed and not self._paused and (step := self._scheduler.schedule()) is not None:
            self._pipeline.begin(step.requests)
            self._outbox.add(step)

    def _submit(self, step: Step) -> None:
        """Send a step off, unless the stages that it was made for are gone."""
        pipeline = self._pipeline
        if step.epoch == self._scheduler.epoch:
            pipeline.submit(step)

    def _loop(self) -> None:
        try:
            while not self._closed:
                self._handle(self._inbox.get())
                if not self._inbox.empty():
                    continue
                with self._lock:
                    self._line_up_steps()
                self._outbox.send(self._submit)
                self._receivers.hand_out()  # while the stages compute the next step
                if self._pipeline.leaves_time:
                    with self._lock:
                        step = self._scheduler.prepare()
                    if step is not None:
                        self._pipeline.prepare(step)
        finally:
            self._receivers.hand_out()  # what came before, whatever ending the requests meets
            self._stop(_BUG)

    def _stop(self, reason: str) -> None:
        """End every request, so that nobody waits for an engine that has stopped."""
        with self._lock:
            self._reason = self._reason if self._closed else reason
            self._draining = True
            self._owe(self._scheduler.fail_all(reason))
            self._idle.notify_all()
        self._receivers.hand_out()

    def _handle(self, message: Message | None) -> None:
        """Commit what came back from the stages; None only wakes the loop."""
        if isinstance(message, _Broken):
            raise RuntimeError("a worker could not commit its tokens")
        with self._lock:
            if self._closed or message is None:
                return
            self._owe(self._events_of(message))
            if not self._scheduler.has_work:
                self._idle.notify_all()

    def _events_of(self, message: Outcome) -> list[TokenEvent]:
        """What the message means for the requests. Called under the lock."""
        if isinstance(message, Restarted):
            self._pipeline.restore(message.loss, self._scheduler.held())
            return []
        if isinstance(message, Resumed):
            self._scheduler.go_back(message.ends, message.refill)
            self._paused, self._reason = False, ""
            return []
        if isinstance(message, Interruption):
            self._paused = True
            self._reason = str(message.error)
            if message.final:
                self._lost = self._reason
                return self._scheduler.fail_all(self._reason)
            self._scheduler.halt()
            return []
        if message.epoch != self._scheduler.epoch:
            return []
        if isinstance(message, Failure):
            self._reason = str(message.error)
            full = isinstance(message.error, DeviceOutOfMemory)
            events = self._scheduler.fail_step(message.step, self._reason, newest_only=full)
            if all(event.request_id != _WARM_UP_ID for event in events):
                # Its token shows whether the stages are well again, unless that of another one that waits does.
                with suppress(InvalidRequest, QueueFull):
                    self._scheduler.submit(_WARM_UP)
            return events
        self._reason = ""
        return self._scheduler.commit(message)

    def _owe(self, events: list[TokenEvent]) -> None:
        """Line up events for their receivers, and forget ended requests. Called under the lock."""
        for event in events:
            self._completion_tokens += len(event.token_ids) if event.request_id != _WARM_UP_ID else 0
            if event.finish_reason is not None:
                self._pipeline.forget(event.request_id)
        self._receivers.owe(events)
