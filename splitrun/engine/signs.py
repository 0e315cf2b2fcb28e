"""What stage processes tell of themselves: that they live, whether they compute, their clocks, what they did when.

Knows which device runs which stages; what is done about silence is another's business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from splitrun import errors
from splitrun.engine.record import Record, Span, StageClock
from splitrun.errors import StageError, StageLost
from splitrun.schedule.flat import MalformedMessage
from splitrun.transport.frames import Frame

FIRST_LOOK_S = 0.05
"""How often to look whether a process has ended that was not heard yet."""


class Signs:
    """Of the processes of ``devices``. ``peers``: who runs each stage. ``silence_s`` counts what its owner adds."""

    def __init__(self, peers: tuple[str, ...], devices: Iterable[str]) -> None:
        self._peers = peers
        self.silence_s = dict.fromkeys(devices, 0.0)
        self._first = {device: threading.Event() for device in self.silence_s}
        self._busy: dict[str, bool] = {}
        self._offsets_s: dict[str, float] = {}

    def forgive(self) -> None:
        """Count silence from now on."""
        self.silence_s = dict.fromkeys(self.silence_s, 0.0)

    def heard(self, device: str) -> None:
        """Something came from there. Heartbeats have a connection of their own, and one lost packet holds it up for a
        second or two where the way is long: what comes on another is as good a sign."""
        if device in self.silence_s:
            self.silence_s[device] = 0.0
            self._first[device].set()

    def listen_for(self, devices: Iterable[str]) -> None:
        """These are about to connect: what was heard before was of others."""
        for device in devices:
            self._first[device].clear()

    def await_first(self, device: str, most_s: float, ended: Callable[[], str]) -> None:
        """Wait for the first sign since ``listen_for``: over a long way, connecting alone may take longer than a
        running process may be silent. Raises StageLost after ``most_s``, or when ``ended`` says how it ended."""
        until = time.monotonic() + most_s
        while not self._first[device].wait(FIRST_LOOK_S):
            if reason := ended():
                raise StageLost(f"{device} {reason}")
            if time.monotonic() > until:
                raise StageLost(f"{device} runs, but nothing of it arrives: does the firewall here let its ports in?")

    def forget(self, device: str) -> None:
        """Nothing is heard of that device from now on, and nobody misses it."""
        self._peers = tuple("" if peer == device else peer for peer in self._peers)
        del self.silence_s[device]
        self._busy.pop(device, None)

    @property
    def busy(self) -> bool:
        """Whether some process said last that it computes."""
        return any(self._busy.values())

    def stages_of(self, device: str) -> list[int]:
        """The stages that a device runs."""
        return [index for index, peer in enumerate(self._peers) if peer == device]

    def known(self, device: str) -> str:
        """The device, if it is one of these. Raises MalformedMessage."""
        if device not in self.silence_s:
            raise MalformedMessage("a sign of nobody")
        return device

    def beat(self, device: str, frame: Frame, clocks: tuple[StageClock, ...]) -> None:
        """A heartbeat, with the figures of the device's stages. Modifies the clocks. Raises MalformedMessage."""
        self._busy[self.known(device)] = bool(frame.control.get("busy"))
        told = frame.control.get("clocks")
        if not clocks or not isinstance(told, dict):
            return
        for index in self.stages_of(device):
            figures = told.get(str(index))
            if isinstance(figures, list) and len(figures) == 5 and all(isinstance(one, int | float) for one in figures):
                clock = clocks[index]
                clock.last_s, clock.total_s, clock.steps = float(figures[0]), float(figures[1]), int(figures[2])
                clock.queued, clock.sent_bytes = int(figures[3]), int(figures[4])

    def spans(self, device: str, frame: Frame, record: Record) -> None:
        """Keep spans of another process, on this one's clock: the quickest message so far sets the two alike.

        Raises MalformedMessage.
        """
        try:
            offset_s = time.monotonic() - float(frame.control["now"])
            self._offsets_s[device] = min(offset_s, self._offsets_s.get(device, offset_s))
            for values in frame.control["spans"]:
                span = Span.from_list(values, self._offsets_s[device])
                if span.stage in self.stages_of(device):
                    record.keep(span)
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedMessage(f"these are no spans: {error}") from error


def told_error(device: str, frame: Frame) -> StageError:
    """The error in a frame that tells of a failure. The process calls its device by another name."""
    kind = getattr(errors, str(frame.control.get("kind")), StageError)
    known = kind if isinstance(kind, type) and issubclass(kind, StageError) else StageError
    return known(f"{device}: {frame.control.get('message', '')}")
