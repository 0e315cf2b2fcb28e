"""Stages in one process: a thread per device, and hops that carry activations between devices.

Between CPU and GPU an activation goes through pinned buffers that are allocated once, on the worker's own stream. The
thread that receives waits for the copy's event, not for the device. Knows tensors and devices, neither models nor
steps.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from splitrun.errors import StageTimeout

Result = TypeVar("Result")
Task = Callable[[], Callable[[], None] | None]
"""Work on a device. What it returns is called behind it, when the device is free for others."""
Failed = Callable[[Exception], None]

FEW_ROWS = 16
"""Rows that a stage that reads pinned memory copies there without the help of a hop: those of a decoding step."""
_CURRENT = threading.local()
"""``worker``: the worker whose thread this is; ``stream``: the CUDA stream that it works on, once that is known."""


class Worker:
    """One thread that owns a device: work on the device is done there, in the order of posting, one task at a time.

    A processor's worker may lend its thread to that of an accelerator, whose tasks do little but launch. ``threads`` is
    the number of CPU threads that its operators use; None leaves torch's default.
    """

    def __init__(self, device: str, threads: int | None = None) -> None:
        self.device = device
        self._threads = threads
        self._tasks: queue.SimpleQueue[tuple[Task, Failed] | None] = queue.SimpleQueue()
        self._unfinished = 1  # until the thread has set itself up
        self._counting, self._turn = threading.Lock(), threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        self._thread = threading.Thread(target=self._loop, name=f"splitrun {device}", daemon=True)
        self._thread.start()

    def post(self, task: Task, failed: Failed) -> None:
        """Run ``task`` after everything posted before; ``failed`` is told what it raises, on the same thread."""
        with self._counting:
            self._unfinished += 1
        self._tasks.put((task, failed))

    def run_here(self, task: Task, failed: Failed) -> bool:
        """Run ``task`` at once on the calling thread, which must be another worker's: handing it over would take
        longer than launching. False, and nothing done, when this worker has something to do or is a processor's."""
        caller = getattr(_CURRENT, "worker", None)
        if caller is None or caller is self or self.device.startswith("cpu"):
            return False
        with self._counting:
            if self._unfinished:
                return False
            self._unfinished += 1
        if self._stream is None:
            self._do(task, failed)
            return True
        before: torch.cuda.Stream | None = getattr(_CURRENT, "stream", None)
        before = before or torch.cuda.current_stream()  # torch's own way of changing streams looks this up every time
        _CURRENT.stream = self._stream
        torch.cuda.set_stream(self._stream)
        try:
            self._do(task, failed)
        finally:  # this stream may be recorded by its own thread later
            _CURRENT.stream = before
            torch.cuda.set_stream(before)
        return True

    def call(self, function: Callable[[], Result], timeout_s: float | None = None) -> Result:
        """Run ``function`` on the worker, wait, and return its result or raise what it raised.

        Raises StageTimeout when the worker is still busy with something else, or with this, after ``timeout_s``.
        """
        future: Future[Result] = Future()
        self.post(lambda: future.set_result(function()), future.set_exception)
        try:
            return future.result(timeout_s)
        except FutureTimeout as error:
            if future.done():
                raise
            raise StageTimeout(f"{self.device} is still busy after {timeout_s:.0f} s") from error

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self, timeout_s: float | None = None) -> None:
        """Finish what was posted, then end the thread; one that is stuck for ``timeout_s`` is left behind, a daemon."""
        self._tasks.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _loop(self) -> None:
        _CURRENT.worker = self
        fault: Exception | None = None
        try:
            self._set_up()
        except Exception as error:  # the worker boundary: who posts something is told, and does not wait for ever
            fault = error
        self._count_finished()
        while (entry := self._tasks.get()) is not None:
            if fault is not None:
                self._count_finished()
                entry[1](fault)
            else:
                self._do(*entry)
            del entry

    def _set_up(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        if self.device.startswith("cuda"):
            torch.cuda.set_device(torch.device(self.device))
            self._stream = torch.cuda.Stream(torch.device(self.device))
            torch.cuda.set_stream(self._stream)
            _CURRENT.stream = self._stream

    def _do(self, task: Task, failed: Failed) -> None:
        try:
            try:
                with self._turn:
                    behind = task()
            finally:
                self._count_finished()
            if behind is not None:
                behind()
        except Exception as error:  # the worker boundary: a task's fault must not end the thread
            failed(error)

    def _count_finished(self) -> None:
        with self._counting:
            self._unfinished -= 1


def torch_device(name: str) -> str:
    """The torch device of a placement's device, on its own machine: every virtual CPU is torch's one CPU."""
    device = name.rpartition("/")[2]
    return "cpu" if device.split(":")[0] == "cpu" else device


@dataclass(frozen=True)
class Parcel:
    """An activation on its way. ``ready`` is recorded behind the copy that fills ``tensor``; None: it is filled."""

    tensor: Tensor
    ready: torch.cuda.Event | None = None


class Hop(Protocol):
    """One way between two devices. ``send`` runs on the source's worker, ``receive`` on the target's."""

    def send(self, activation: Tensor) -> Parcel:
        """Start the activation on its way. Shape: (tokens, hidden), unchanged."""

    def receive(self, parcel: Parcel) -> Tensor:
        """The activation on the target device. Valid until ``depth`` further ones were received."""


class SameMemory:
    """Both stages read the same memory: nothing moves."""

    def send(self, activation: Tensor) -> Parcel:
        """The tensor itself."""
        return Parcel(activation)

    def receive(self, parcel: Parcel) -> Tensor:
        """The tensor itself."""
        return parcel.tensor


class PinnedRing:
    """Pinned host buffers used in turn, each of ``tokens`` rows. A buffer is free again once its step has returned."""

    def __init__(self, depth: int, tokens: int, hidden: int, dtype: torch.dtype) -> None:
        pin = torch.cuda.is_available()
        self._buffers = [torch.empty((tokens, hidden), dtype=dtype, pin_memory=pin) for _ in range(depth)]
        self._events = [torch.cuda.Event() for _ in range(depth)] if pin else []
        self._next = 0

    def take(self, tokens: int) -> Tensor:
        """The next buffer's first rows. Shape: (tokens, hidden)."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        return buffer[:tokens]

    def mark(self) -> torch.cuda.Event:
        """An event of the turn's own, recorded behind the current stream's work."""
        event = self._events[self._next]
        event.record()
        return event


class DeviceToHost:
    """From a GPU to the CPU through pinned memory. ``left``: the event behind what the stage has just left in pinned
    memory itself, None when it is there already."""

    def __init__(self, ring: PinnedRing) -> None:
        self._ring = ring
        self.left: Callable[[], torch.cuda.Event | None] = ring.mark

    def send(self, activation: Tensor) -> Parcel:
        """Copy on the source's stream and mark its end, unless the stage has left it in pinned memory. Devices other
        than CUDA's have no such events: they wait."""
        if activation.device.type == "cpu":
            return Parcel(activation, self.left())
        if activation.device.type != "cuda":
            return Parcel(activation.to("cpu"))
        buffer = self._ring.take(activation.shape[0])
        buffer.copy_(activation, non_blocking=True)
        return Parcel(buffer, self._ring.mark())

    def receive(self, parcel: Parcel) -> Tensor:
        """Wait for that copy alone."""
        if parcel.ready is not None:
            parcel.ready.synchronize()
        return parcel.tensor


class HostToDevice:
    """From the CPU to a GPU through pinned memory; only into that memory where the target copies from there itself."""

    def __init__(self, ring: PinnedRing, target: str | None) -> None:
        self._ring = ring
        self._target = None if target is None else torch.device(target)

    def send(self, activation: Tensor) -> Parcel:
        """Put the activation into pinned memory; a few rows the target puts there itself."""
        if self._target is None and activation.shape[0] <= FEW_ROWS:
            return Parcel(activation)
        buffer = self._ring.take(activation.shape[0])
        buffer.copy_(activation)
        return Parcel(buffer)

    def receive(self, parcel: Parcel) -> Tensor:
        """Copy on the target's stream: the stage's work queues behind it."""
        return parcel.tensor if self._target is None else parcel.tensor.to(self._target, non_blocking=True)


class DeviceToDevice:
    """Between two GPUs: torch copies peer to peer where the cards can, else through the host."""

    def __init__(self, target: str) -> None:
        self._target = torch.device(target)

    def send(self, activation: Tensor) -> Parcel:
        """Mark the end of the source's work."""
        ready = torch.cuda.Event()
        ready.record()
        return Parcel(activation, ready)

    def receive(self, parcel: Parcel) -> Tensor:
        """Copy behind the source's work, without blocking this thread."""
        if parcel.ready is not None:
            torch.cuda.current_stream(self._target).wait_event(parcel.ready)
        # torch copies on this thread's stream of the source's device; until then its memory must not be used again
        parcel.tensor.record_stream(torch.cuda.current_stream(parcel.tensor.device))
        return parcel.tensor.to(self._target, non_blocking=True)


class FromHost:
    """From main memory to a device, for activations whose type is known only when they come from another process."""

    def __init__(self, target: str) -> None:
        self._target = torch.device(target)

    def send(self, activation: Tensor) -> Parcel:
        """The tensor itself."""
        return Parcel(activation)

    def receive(self, parcel: Parcel) -> Tensor:
        """Copied to the device; the tensor itself when that is the CPU."""
        return parcel.tensor.to(self._target)


def hop(
    source: str, target: str, *, depth: int, tokens: int, hidden: int, dtype: torch.dtype, reads_host: bool = False
) -> Hop:
    """The way from one device to another for activations of up to ``tokens`` rows of the source's type.

    ``reads_host``: the target's stage takes them from pinned memory.
    """
    start, end = torch_device(source), torch_device(target)
    if start == end:
        return SameMemory()
    if end == "cpu":
        return DeviceToHost(PinnedRing(depth, tokens, hidden, dtype))
    if start == "cpu":
        return HostToDevice(PinnedRing(depth, tokens, hidden, dtype), None if reads_host else end)
    return DeviceToDevice(end)
