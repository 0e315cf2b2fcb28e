"""Mailboxes: what is sent arrives in order; strangers, other sessions and nonsense do not get in."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest
import torch
import zmq

from splitrun.errors import ClusterError
from splitrun.schedule.flat import MalformedMessage
from splitrun.transport.frames import Frame, Kind, encode
from splitrun.transport.mailbox import Address, FakeNetwork, Mailbox
from splitrun.transport.socket import SocketMailbox

SESSION = 41
WAIT_S = 20.0
Pair = tuple[Mailbox, Mailbox, "queue.SimpleQueue[Frame]"]


@pytest.fixture(params=["socket", "fake"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two mailboxes that know each other, and what the second reads."""
    arrived: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    if request.param == "fake":
        network = FakeNetwork(SESSION)
        first, second = network.mailbox(print), network.mailbox(arrived.put)
    else:
        first, second = SocketMailbox(SESSION, print), SocketMailbox(SESSION, arrived.put)
    first.connect("second", second.address)
    second.connect("first", first.address)
    yield first, second, arrived
    first.close()
    second.close()


def test_frames_arrive_in_order_with_their_activations(pair: Pair) -> None:
    first, _, arrived = pair
    bodies = [torch.randn(3, 5) for _ in range(50)]
    for step, body in enumerate(bodies):
        first.send("second", Frame(Kind.STEP, SESSION, step=step, body=body))
    for step, body in enumerate(bodies):
        frame = arrived.get(timeout=WAIT_S)
        assert frame.step == step
        assert frame.body is not None
        assert torch.equal(frame.body, body)


def test_a_frame_of_another_session_is_dropped(pair: Pair) -> None:
    first, second, arrived = pair
    first.send("second", Frame(Kind.BEAT, SESSION + 1))
    first.send("second", Frame(Kind.BEAT, SESSION, step=7))
    assert arrived.get(timeout=WAIT_S).step == 7
    assert second.dropped.counts() == {"foreign session": 1}


def test_a_frame_to_nobody_is_dropped(pair: Pair) -> None:
    pair[0].send("third", Frame(Kind.BEAT, SESSION))
    assert pair[0].dropped.counts() == {"no such peer": 1}


def raw_socket(server: Address, keys: tuple[bytes, bytes] | None) -> zmq.Socket[bytes]:
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.linger = 0
    if keys is not None:
        socket.curve_publickey, socket.curve_secretkey = keys
        socket.curve_serverkey = server.public_key.encode()
    socket.connect(server.endpoint)
    return socket


@pytest.mark.parametrize("keys", [None, zmq.curve_keypair()], ids=["without keys", "with keys of its own"])
def test_a_stranger_is_refused(keys: tuple[bytes, bytes] | None) -> None:
    arrived: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    mailbox, friend = SocketMailbox(SESSION, arrived.put), SocketMailbox(SESSION, print)
    mailbox.connect("friend", friend.address)
    friend.connect("mailbox", mailbox.address)
    with raw_socket(mailbox.address, keys) as stranger:
        refused = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED)
        stranger.send_multipart(encode(Frame(Kind.BEAT, SESSION, step=1)))
        assert refused.poll(WAIT_S * 1000)
        stranger.disable_monitor()
        friend.send("mailbox", Frame(Kind.BEAT, SESSION, step=2))
        assert arrived.get(timeout=WAIT_S).step == 2
        assert arrived.empty()
    assert ("unknown key" in mailbox.dropped.counts()) == (keys is not None)
    mailbox.close()
    friend.close()


def test_nonsense_of_a_peer_is_dropped_and_counted() -> None:
    read = threading.Event()

    def receive(frame: Frame) -> None:
        if frame.step == 1:
            raise MalformedMessage("a step that is none")
        read.set()

    mailbox = SocketMailbox(SESSION, receive)
    keys = zmq.curve_keypair()
    mailbox.connect("peer", Address("tcp://127.0.0.1:9", keys[0].decode()))
    with raw_socket(mailbox.address, keys) as peer:
        peer.send(b"nonsense")
        peer.send_multipart([b"", b"", b"", b""])
        peer.send_multipart(encode(Frame(Kind.BEAT, SESSION, step=1)))
        peer.send_multipart(encode(Frame(Kind.BEAT, SESSION, step=2)))
        assert read.wait(WAIT_S)
    assert mailbox.dropped.counts() == {"malformed": 3}
    mailbox.close()


def test_a_peer_may_come_back_elsewhere() -> None:
    arrived: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    sender = SocketMailbox(SESSION, print)
    for step in range(3):
        receiver = SocketMailbox(SESSION, arrived.put)
        receiver.connect("sender", sender.address)
        sender.connect("receiver", receiver.address)
        sender.send("receiver", Frame(Kind.BEAT, SESSION, step=step))
        assert arrived.get(timeout=WAIT_S).step == step
        receiver.close()
        sender.send("receiver", Frame(Kind.BEAT, SESSION, step=99))
    sender.close()
    sender.close()
    assert arrived.empty()


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"cannot listen on 192\.0\.2\.1"):
        SocketMailbox(SESSION, print, host="192.0.2.1")


@pytest.mark.parametrize("copies", [0, 2])
def test_the_fake_loses_and_duplicates(copies: int) -> None:
    arrived: list[Frame] = []
    network = FakeNetwork(SESSION, lambda parts: [parts] * copies)
    first, second = network.mailbox(print), network.mailbox(arrived.append)
    first.connect("second", second.address)
    first.send("second", Frame(Kind.BEAT, SESSION))
    assert len(arrived) == copies
