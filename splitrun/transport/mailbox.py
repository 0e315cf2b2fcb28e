"""How processes exchange frames: a mailbox per process, addressed by name. Also the fake one, for tests.

A mailbox never blocks and never raises for the other side's fault: what cannot be sent or must not be read is dropped
and counted. Order between two mailboxes is kept, heartbeats aside. Knows neither steps nor stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from splitrun.schedule.flat import MalformedMessage
from splitrun.transport.frames import Frame, Part, decode, encode
from splitrun.transport.gate import Dropped


@dataclass(frozen=True)
class Address:
    """Where a mailbox listens and the public key that proves it is the right one."""

    endpoint: str
    public_key: str


class Mailbox(Protocol):
    """One process's end of the exchange. ``dropped`` counts what was not sent or not read, by reason."""

    address: Address
    dropped: Dropped

    def connect(self, peer: str, address: Address) -> None:
        """Frames to ``peer`` go there from now on, and frames from there are read. Replaces an earlier address."""

    def send(self, peer: str, frame: Frame) -> bool:
        """Send a frame; returns at once, whether it is on its way. Any thread."""

    def close(self) -> None:
        """Stop reading and give the port back."""


def opened(parts: Sequence[Part], session: int, dropped: Dropped) -> Frame | None:
    """The frame in the parts, or None and a count when it is malformed or of another session."""
    try:
        frame = decode(parts)
    except MalformedMessage:
        dropped.add("malformed")
        return None
    if frame.session != session:
        dropped.add("foreign session")
        return None
    return frame


Tamper = Callable[[list[bytes]], list[list[bytes]]]


class FakeNetwork:
    """Mailboxes in one process, without sockets. ``tamper`` turns the parts of a frame into those that arrive: none
    (lost), several (duplicated), or other bytes."""

    def __init__(self, session: int, tamper: Tamper = lambda parts: [parts]) -> None:
        self.session = session
        self.tamper = tamper
        self.mailboxes: dict[str, FakeMailbox] = {}

    def mailbox(self, receive: Callable[[Frame], None]) -> FakeMailbox:
        """A new mailbox; ``receive`` is called on the sender's thread."""
        made = FakeMailbox(self, f"fake://{len(self.mailboxes)}", receive)
        self.mailboxes[made.address.endpoint] = made
        return made


class FakeMailbox:
    """A `Mailbox` of a `FakeNetwork`. Frames are encoded and decoded as they would be on the way."""

    def __init__(self, network: FakeNetwork, endpoint: str, receive: Callable[[Frame], None]) -> None:
        self.address = Address(endpoint, "")
        self.dropped = Dropped()
        self._network = network
        self._receive = receive
        self._peers: dict[str, str] = {}

    def connect(self, peer: str, address: Address) -> None:
        """See `Mailbox`."""
        self._peers[peer] = address.endpoint

    def send(self, peer: str, frame: Frame) -> bool:
        """See `Mailbox`; returns when the frame has been read."""
        target = self._network.mailboxes.get(self._peers.get(peer, ""))
        if target is None:
            self.dropped.add("no such peer")
            return False
        for parts in self._network.tamper([bytes(part) for part in encode(frame)]):
            arrived = opened(parts, self._network.session, target.dropped)
            if arrived is not None:
                target._take(arrived)
        return True

    def _take(self, frame: Frame) -> None:
        try:
            self._receive(frame)
        except MalformedMessage:
            self.dropped.add("malformed")

    def close(self) -> None:
        """See `Mailbox`."""
        self._network.mailboxes.pop(self.address.endpoint, None)
