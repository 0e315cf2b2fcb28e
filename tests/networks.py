"""A second network on this machine, for tests: a namespace of Linux at the other end of a line that is slow or rough.

``wire`` is a pair of virtual cards (veth), ``shaped`` one with a rate (``tc``); ``rough`` a line through this process,
which delays and loses packets: kernels of test machines often lack what ``tc`` needs for that. All need root.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_SET_INTERFACE = 0x400454CA  # TUNSETIFF
_TAP_WITHOUT_INFO = 0x0002 | 0x1000


def possible() -> bool:
    """Whether this user may make namespaces here."""
    return (
        os.geteuid() == 0
        and shutil.which("ip") is not None
        and Path("/dev/net/tun").exists()
        and subprocess.run(["ip", "netns", "list"], capture_output=True, check=False).returncode == 0
    )


@dataclass(frozen=True)
class Line:
    """The two ends: ``here`` and ``there`` are addresses, ``namespace`` the other network's name, ``near`` the card
    here and ``far`` the one there."""

    namespace: str
    here: str
    there: str
    near: str
    far: str

    @classmethod
    def numbered(cls, number: int) -> Line:
        """The line of that number (1 to 250), which tells lines apart, also those of other processes."""
        network = f"10.203.{number}"
        return cls(f"splitrun-{number}", f"{network}.1", f"{network}.2", f"sr{number}a", f"sr{number}b")

    def command(self, *words: str) -> list[str]:
        """A command line that runs in the other network."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def set(self, state: str) -> None:
        """Pull the plug at the other end ("down"), or put it in again ("up"). What is sent from here then goes
        nowhere, and not another way."""
        run(*self.command("ip", "link", "set", self.far, state))


def run(*words: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(words, check=True, capture_output=True)


def output(*words: str) -> str:
    """What a command that must succeed prints."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def enter(namespace: str) -> None:
    """Move this thread into another network."""
    with Path("/var/run/netns", namespace).open("rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NEW_NETWORK) != 0:
            raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def wire() -> Iterator[Line]:
    """A line as fast as this machine."""
    with _namespace() as line:
        run("ip", "link", "add", line.near, "type", "veth", "peer", "name", line.far, "netns", line.namespace)
        _raise(line)
        yield line


@contextmanager
def shaped(rate: str = "1gbit") -> Iterator[Line]:
    """A line with that rate in both directions."""
    with wire() as line:
        shape = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
        run("tc", "qdisc", "add", "dev", line.near, *shape)
        run(*line.command("tc", "qdisc", "add", "dev", line.far, *shape))
        yield line


@contextmanager
def rough(round_trip_s: float, loss: float) -> Iterator[Line]:
    """A line with a delay, on which each packet is lost with the probability ``loss``, in both directions."""
    with _namespace() as line:
        cards = [_tap(line.near, None), _tap(line.far, line.namespace)]
        _raise(line)
        ended = threading.Event()
        thread = threading.Thread(target=_carry, args=(cards, round_trip_s / 2, loss, ended), daemon=True)
        thread.start()
        try:
            yield line
        finally:
            ended.set()
            thread.join()
            for end in cards:
                os.close(end)


@contextmanager
def _namespace() -> Iterator[Line]:
    line = _free()
    try:
        run(*line.command("ip", "link", "set", "lo", "up"))
        yield line
    finally:
        subprocess.run(["ip", "link", "delete", line.near], check=False, capture_output=True)
        run("ip", "netns", "delete", line.namespace)


def _free() -> Line:
    """A line that nobody has, its namespace made: making one fails where another process has that number."""
    refused = ""
    for number in random.sample(range(1, 251), 250):
        line = Line.numbered(number)
        if Path("/sys/class/net", line.near).exists():
            continue  # left by a run that was killed
        made = subprocess.run(["ip", "netns", "add", line.namespace], capture_output=True, text=True, check=False)
        if made.returncode == 0:
            return line
        refused = made.stderr
    raise OSError(f"no network could be made: {refused.strip()}")


def _raise(line: Line) -> None:
    """Give both cards their addresses and switch them on."""
    run("ip", "addr", "add", f"{line.here}/24", "dev", line.near)
    run("ip", "link", "set", line.near, "up")
    run(*line.command("ip", "addr", "add", f"{line.there}/24", "dev", line.far))
    run(*line.command("ip", "link", "set", line.far, "up"))


def _tap(name: str, namespace: str | None) -> int:
    """A virtual Ethernet card whose frames are read from the descriptor and written to it."""
    made: list[int] = []

    def make() -> None:
        if namespace is not None:
            enter(namespace)
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, _SET_INTERFACE, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_INFO))
        made.append(descriptor)

    thread = threading.Thread(target=make)  # of its own, because it may move to the other network
    thread.start()
    thread.join()
    return made[0]


def _carry(ends: list[int], delay_s: float, loss: float, ended: threading.Event) -> None:
    """Carry frames between the ends, late, and some of them never."""
    chance = random.Random(1)
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while not ended.is_set():
        wait_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.2
        for end in select.select(ends, [], [], min(wait_s, 0.2))[0]:
            frame = os.read(end, 65536)
            count += 1
            if chance.random() >= loss:
                target = ends[1] if end == ends[0] else ends[0]
                heapq.heappush(waiting, (time.monotonic() + delay_s, count, target, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, frame = heapq.heappop(waiting)
            try:
                os.write(target, frame)
            except OSError:
                continue  # the card is down, or its queue is full: lost too
