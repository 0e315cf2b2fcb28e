"""The coordinator's side of stages in other processes: start them, hear their heartbeats, start lost ones again.

When a process ends, falls silent or misses a step, the requests wait, the process is started again and given what was
kept of its KV; the rest is computed again from its tokens. Knows processes and frames, nothing of requests.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from splitrun.cluster.nodes import NodeLost
from splitrun.cluster.process import StageHandle, failures_of
from splitrun.engine.exchange import COORDINATOR, Exchange, Route
from splitrun.engine.kept import KeptKV
from splitrun.engine.outcome import Failure, Interruption, Outcome, Restarted, Resumed
from splitrun.engine.patience import LOOPBACK, Listening, Patience, Successor
from splitrun.engine.pipeline import Pipeline
from splitrun.engine.record import StageClock
from splitrun.engine.restoring import Restoration
from splitrun.engine.signs import Signs, told_error
from splitrun.errors import SplitrunError, StageLost
from splitrun.schedule.flat import MalformedMessage
from splitrun.schedule.scheduler import Held
from splitrun.schedule.step import Step, Tokens
from splitrun.transport.frames import Frame, Kind
from splitrun.transport.mailbox import Address
from splitrun.transport.messages import kv_of
from splitrun.transport.socket import SocketMailbox

Starter = Callable[[str, Mapping[str, Any]], StageHandle]
"""Starts the process of a device with its job."""


class RemoteStages:
    """All stage processes of a placement. ``peers``: per stage the device's name, or COORDINATOR for one that is here.

    ``jobs`` has one entry per device in a process of its own: what ``stage_host`` needs, less what is decided here.
    ``here`` is where the coordinator listens. ``successor`` is asked, from the watching thread, what becomes of devices
    that are lost for good; without one the requests end. ``kept``: stage with KV -> most bytes to keep of it here.
    ``journals``: stages keep what they send to other processes.
    """

    def __init__(
        self,
        peers: tuple[str, ...],
        jobs: Mapping[str, Mapping[str, Any]],
        starter: Starter,
        patience: Patience,
        here: Listening = LOOPBACK,
        successor: Successor | None = None,
        kept: Mapping[int, int] | None = None,
        journals: bool = False,
    ) -> None:
        self._patience = patience
        self._starter = starter
        self._successor = successor
        session = secrets.randbits(64)
        decided = {"session": session, "peers": peers, "beat_s": patience.beat_s}
        self._jobs = {device: {**job, **decided, "device": device} for device, job in jobs.items()}
        self._exchange = Exchange(Route(session, peers), COORDINATOR)
        self._mailbox = SocketMailbox(session, self._receive, here.host, here.ports)
        self._addresses = {COORDINATOR: self._mailbox.address}
        self._processes: dict[str, StageHandle] = {}
        self._signs = Signs(peers, jobs)
        self._kept = KeptKV(kept or {})
        self._restoration = Restoration(self._kept, session, self._send_to, self._resume, journals=journals)
        self._stalled_s = 0.0
        self._reports: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._deliver: Callable[[Outcome], None] = lambda outcome: None
        self._clocks: tuple[StageClock, ...] = ()
        self._losses = 0
        self.memory_bytes: dict[int, int] = {}
        self.loading_s = 0.0

    def start(self) -> None:
        """Start and load all processes at once. Raises what the first of them could not do, after ending all."""
        failures = self._bring_up(set(self._jobs))
        if failures:
            self.close()
            raise next(iter(failures.values()))

    def run(self, pipeline: Pipeline, deliver: Callable[[Outcome], None]) -> None:
        """Join the pipeline and watch over the processes from now on."""
        self._exchange.pipeline = pipeline
        self._deliver = deliver
        self._clocks = pipeline.clocks
        self._thread = threading.Thread(target=self._watch, name="splitrun stages", daemon=True)
        self._thread.start()

    def send(self, stage: int, step: Step, activation: Tensor | None) -> None:
        """Send a step to a stage in another process."""
        self._exchange.send_step(self._mailbox, stage, step, activation)

    def begin(self, requests: Collection[int]) -> None:
        """See `Elsewhere`."""
        self._kept.begin(requests)

    def forget(self, request: int) -> None:
        """See `Elsewhere`."""
        self._restoration.forget(request)

    def kept_bytes(self, stage: int) -> int:
        """See `Elsewhere`."""
        return self._kept.stage_bytes(stage)

    def restore(self, loss: int, held: Iterable[Held]) -> None:
        """See `Pipeline.restore`."""
        self._restoration.begin(loss, held)

    def _resume(self, ends: Mapping[int, int], refill: Collection[int]) -> None:
        self._kept.drop([stage for stage, peer in enumerate(self._exchange.route.peers) if peer == COORDINATOR])
        self.outcome(Resumed(ends, tuple(refill)))

    def outcome(self, outcome: Outcome) -> None:
        """Pass on what came of a step, here or elsewhere. Any thread."""
        self._exchange.settle(outcome)
        if isinstance(outcome, Tokens):
            self._losses = 0
            self._stalled_s = 0.0
        self._deliver(outcome)

    @property
    def alive(self) -> bool:
        """Whether the processes are watched over."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._stopping.set()
            processes = list(self._processes.values())
        for process in processes:
            _end(process)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._mailbox.close()

    def _bring_up(self, devices: set[str]) -> dict[str, SplitrunError]:
        """Start these processes, and tell all of them who the peers are. Returns what failed; empty: all run."""
        patience = self._patience.start_s
        began = time.monotonic()
        failures = failures_of(devices, self._start)
        failures |= failures_of(devices - failures.keys(), lambda device: self._learn_address(device, patience))
        failures |= failures_of(devices - failures.keys(), lambda device: self._await_loading(device, patience))
        if failures:
            return failures
        peers = {name: (address.endpoint, address.public_key) for name, address in self._addresses.items()}
        self._signs.listen_for(devices)
        for process in self._processes.values():
            process.tell({"peers": peers})
        failures = failures_of(self._jobs, lambda device: self._processes[device].expect("connected", patience))
        failures |= failures_of(devices - failures.keys(), lambda device: self._await_sign(device, patience))
        self._signs.forgive()
        self._stalled_s = 0.0
        if devices:
            self.loading_s = time.monotonic() - began
        return failures

    def _start(self, device: str) -> None:
        earlier = self._processes.get(device)
        if earlier is not None:
            earlier.kill()
        with self._lock:
            if self._stopping.is_set():
                raise StageLost("the engine is closing")
            try:
                self._processes[device] = self._starter(device, self._jobs[device])
            except OSError as error:
                raise StageLost(f"{device} cannot be started: {error.strerror}") from error

    def _learn_address(self, device: str, silence_s: float) -> None:
        endpoint, key = self._processes[device].expect("address", silence_s)
        self._addresses[device] = Address(str(endpoint), str(key))
        self._mailbox.connect(device, self._addresses[device])

    def _await_loading(self, device: str, silence_s: float) -> None:
        loaded = self._processes[device].expect("loaded", silence_s)
        self.memory_bytes |= {int(index): int(count) for index, count in loaded.items()}

    def _await_sign(self, device: str, silence_s: float) -> None:
        self._signs.await_first(device, silence_s, lambda: self._processes[device].end)

    def _watch(self) -> None:
        """Notice what is lost. Silence is counted in this thread's own ticks: when the whole machine stood still, or
        this process did, nobody is to blame."""
        tick_s = self._patience.beat_s / 4
        last = time.monotonic()
        while not self._stopping.wait(tick_s):
            now = time.monotonic()
            elapsed, last = min(now - last, 2 * tick_s), now
            faults = self._faults(elapsed)
            if faults and not self._recovered(faults):
                return

    def _faults(self, elapsed_s: float) -> dict[str, str]:
        """Device -> what is wrong with its process."""
        faults: dict[str, str] = {}
        while not self._reports.empty():
            device, reason = self._reports.get()
            faults[device] = reason
        for device, process in self._processes.items():
            self._signs.silence_s[device] += elapsed_s
            if self._signs.silence_s[device] > self._patience.dead_after_s:
                faults[device] = f"gave no sign of life for {self._patience.dead_after_s:g} s"
            faults[device] = process.end or faults.get(device, "")
        at_work = self._signs.busy or (self._exchange.pipeline is not None and self._exchange.pipeline.busy)
        waiting = self._restoration.waiting or (self._exchange.waiting and not at_work)
        self._stalled_s = self._stalled_s + elapsed_s if waiting else 0.0
        known = {device: reason for device, reason in faults.items() if reason}
        if self._stalled_s > self._patience.stall_s and not known:
            return dict.fromkeys(self._processes, "lost a step, or cannot reach its peers")
        return known

    def _recovered(self, faults: dict[str, str]) -> bool:
        """Start lost processes again, or compute here what they did; False when neither is possible, and all requests
        have been told so."""
        self._losses += 1
        reason = "; ".join(f"{device} {fault}" for device, fault in faults.items())
        attempts = 0
        while not self._stopping.is_set():
            self._interrupt(reason, faults)
            if self._losses > self._patience.starts or attempts == self._patience.starts:
                failures, gone = dict[str, SplitrunError](), set(faults)
            else:
                failures = self._bring_up(set(faults))
                if not failures:
                    break
                attempts += 1
                reason = "; ".join(f"{device}: {error}" for device, error in failures.items())
                gone = {device for device, error in failures.items() if isinstance(error, NodeLost)}
            if gone:
                if not self._taken_over(gone):
                    return self._given_up(reason, gone)
                attempts, self._losses = 0, 1
            ended = (name for name, process in self._processes.items() if process.end)
            faults = dict.fromkeys({*failures, *ended} - gone, "")
        if self._stopping.is_set():  # whoever ends it brings other stages up, or none
            return False
        while not self._reports.empty():
            self._reports.get()  # of the epoch that has ended
        self.outcome(Restarted(self._restoration.losses))
        return True

    def _interrupt(self, reason: str, devices: Collection[str]) -> None:
        """Let the requests wait for the stages of these devices."""
        lost = [index for device in devices for index in self._signs.stages_of(device)]
        for index in lost:
            self._clocks[index].restarts += 1
        interruption = Interruption(StageLost(f"lost: {reason}: it is being started again"))
        self._restoration.lose(lost, lambda: self.outcome(interruption))

    def _taken_over(self, devices: Collection[str]) -> bool:
        """Let this process compute from now on what these devices did, if it can."""
        began = time.monotonic()
        if self._successor is None or self._stopping.is_set() or not self._successor.take_over(devices):
            return False
        for device in devices:
            with self._lock:
                threading.Thread(target=_end, args=(self._processes.pop(device),), daemon=True).start()
            del self._jobs[device]
            self._mailbox.forget(device)
            self._addresses[device] = self._mailbox.address  # where its peers send from now on
            self._exchange.adopt(self._signs.stages_of(device))
            self._signs.forget(device)
        self.loading_s = time.monotonic() - began
        return True

    def _given_up(self, reason: str, devices: Collection[str]) -> bool:
        """Leave what is lost for good to whoever plans again, or end the requests; returns False."""
        if self._stopping.is_set():
            return False
        if self._successor is not None:
            self._successor.replace(reason, devices)
            return False
        again = "restart the server, or plan without that device"
        self.outcome(Interruption(StageLost(f"lost for good: {reason}: {again}"), final=True))
        return False

    def _receive(self, frame: Frame) -> None:
        """Take what stages send. Runs on the mailbox's thread; raises MalformedMessage."""
        if frame.stage >= len(self._exchange.route.peers):
            raise MalformedMessage(f"there is no stage {frame.stage}")
        device = self._exchange.route.peers[frame.stage]
        self._signs.heard(self._exchange.route.peers[frame.stage - (frame.kind is Kind.STEP)])
        if frame.kind is Kind.BEAT:
            self._signs.beat(device, frame, self._clocks)
        elif frame.kind is Kind.SPANS and self._exchange.pipeline is not None:
            self._signs.spans(device, frame, self._exchange.pipeline.record)
        elif frame.kind is Kind.FAILURE:
            self._failure(self._signs.known(device), frame)
        elif frame.kind is Kind.KV:
            kv = kv_of(frame)
            self._kept.take(frame.stage, kv.request, kv.start, kv.rows)
        elif frame.kind is Kind.RESTORED:
            self._placed(frame)
        else:
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        """Take a step or tokens, if it is their turn. Raises MalformedMessage."""
        if frame.kind is Kind.STEP:
            verdict = self._exchange.take_step(frame)
        else:
            verdict, tokens = self._exchange.take_tokens(frame)
            if verdict == "run":
                self.outcome(tokens)
        if verdict != "run":
            self._mailbox.dropped.add(verdict)
        if verdict == "gap":
            sender = frame.stage - (frame.kind is Kind.STEP)
            self._reports.put((self._exchange.route.peers[sender], "lost a step on its way"))

    def _send_to(self, stage: int, frame: Frame) -> bool:
        peer, pipeline = self._exchange.route.peers[stage], self._exchange.pipeline
        if peer != COORDINATOR or pipeline is None:
            return self._mailbox.send(peer, frame)
        pipeline.restore_here(stage, kv_of(frame), lambda: self._placed(frame), self._unrestored)
        return True

    def _unrestored(self, error: Exception) -> None:
        self.outcome(Interruption(StageLost(f"KV could not be restored: {error}"), final=True))

    def _placed(self, frame: Frame) -> None:
        self._stalled_s = 0.0
        self._restoration.placed(frame)

    def _failure(self, device: str, frame: Frame) -> None:
        message = str(frame.control.get("message", ""))
        if frame.control.get("lost"):
            self._reports.put((device, message))
            return
        self.outcome(Failure(frame.step, frame.epoch, told_error(device, frame)))


def _end(process: StageHandle) -> None:
    with suppress(NodeLost):
        process.kill()
