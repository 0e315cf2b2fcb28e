"""Mailboxes over ZeroMQ: TCP, encrypted and authenticated by CURVE.

Each mailbox binds one socket for everything that comes in, and has one socket per peer that it sends to. Every process
has a key pair of its own, made for the session; only peers that were named by ``connect`` get past the handshake.
libzmq sets TCP_NODELAY itself. Frames that wait for a peer that is gone are dropped with its socket.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import zmq
from zmq.utils import z85

from splitrun.errors import ClusterError
from splitrun.schedule.flat import MalformedMessage
from splitrun.transport.frames import MAX_BODY_BYTES, Frame, Kind, encode
from splitrun.transport.gate import Dropped
from splitrun.transport.mailbox import Address, opened

WAITING_FRAMES = 256
"""Most frames that wait for one peer; steps in flight are far fewer."""
WAITING_KV_FRAMES = 8
"""Most frames of KV that do: they may be large, and are sent again later when they do not go now."""
KV_SEND_BUFFER = 256 << 10
"""Bytes of KV that the system may hold: on a slow line heartbeats would come too late behind more of them."""


class _Peer:
    """The sending sockets to one peer, made by the first frames: by then the peer lets this process in.

    Heartbeats have a connection of their own: behind a prompt's activations on a slow line they would come too late.
    So has KV, which nobody waits for. A lock makes it usable from any thread.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: Address, keys: tuple[bytes, bytes]) -> None:
        self.address = address
        self._context = context
        self._keys = keys
        self._lock = threading.Lock()
        self._sockets: dict[Kind, zmq.Socket[bytes]] = {}
        self._closed = False

    def send(self, frame: Frame) -> bool:
        """Whether the frame is on its way."""
        parts = encode(frame)
        with self._lock:
            if self._closed:
                return False
            lane = frame.kind if frame.kind in (Kind.BEAT, Kind.KV) else Kind.STEP
            if lane not in self._sockets:
                self._sockets[lane] = self._connected(lane)
            try:
                self._sockets[lane].send_multipart(parts, zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
        return True

    def close(self) -> None:
        """Drop what waits."""
        with self._lock:
            self._closed = True
            for socket in self._sockets.values():
                socket.close()

    def _connected(self, lane: Kind) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        socket.linger = 0
        socket.sndhwm = WAITING_FRAMES
        if lane is Kind.KV:
            socket.sndhwm = WAITING_KV_FRAMES
            socket.sndbuf = KV_SEND_BUFFER
        socket.curve_publickey, socket.curve_secretkey = self._keys
        socket.curve_serverkey = self.address.public_key.encode()
        socket.connect(self.address.endpoint)
        return socket


class SocketMailbox:
    """A `Mailbox` that listens on a port of ``host`` (an address of this machine).

    ``receive`` is called with each frame on the mailbox's own thread. ``ports``: the first and last to choose from.
    Raises ClusterError when it cannot listen.
    """

    def __init__(
        self,
        session: int,
        receive: Callable[[Frame], None],
        host: str = "127.0.0.1",
        ports: tuple[int, int] = (49152, 65535),
    ) -> None:
        self.dropped = Dropped()
        self._session = session
        self._receive = receive
        self._keys = zmq.curve_keypair()
        self._allowed: frozenset[bytes] = frozenset()
        self._peers: dict[str, _Peer] = {}
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._guard = self._context.socket(zmq.REP)
        self._guard.linger = 0
        self._guard.bind("inproc://zeromq.zap.01")
        inbox = self._context.socket(zmq.PULL)
        inbox.linger = 0
        inbox.maxmsgsize = MAX_BODY_BYTES
        inbox.curve_server = True
        inbox.curve_publickey, inbox.curve_secretkey = self._keys
        try:
            port = inbox.bind_to_random_port(f"tcp://{host}", ports[0], ports[1] + 1)
        except (zmq.ZMQError, zmq.ZMQBindError) as error:
            inbox.close()
            self._guard.close()
            self._context.term()
            raise ClusterError(f"cannot listen on {host}: {error}; give an address of this machine") from error
        self.address = Address(f"tcp://{host}:{port}", self._keys[0].decode())
        self._stop_sender = self._context.socket(zmq.PAIR)
        self._stop_receiver = self._context.socket(zmq.PAIR)
        self._stop_sender.bind("inproc://stop")
        self._stop_receiver.connect("inproc://stop")
        self._thread = threading.Thread(target=self._loop, args=(inbox,), name="splitrun mailbox", daemon=True)
        self._thread.start()

    def connect(self, peer: str, address: Address) -> None:
        """See `Mailbox`."""
        with self._lock:
            earlier = self._peers.get(peer)
            if earlier is not None and earlier.address == address:
                return
            self._peers[peer] = _Peer(self._context, address, self._keys)
            self._let_in_peers()
        if earlier is not None:
            earlier.close()

    def forget(self, peer: str) -> None:
        """Send that peer nothing any more, and refuse its next handshake."""
        with self._lock:
            earlier = self._peers.pop(peer, None)
            self._let_in_peers()
        if earlier is not None:
            earlier.close()

    def _let_in_peers(self) -> None:
        self._allowed = frozenset(known.address.public_key.encode() for known in self._peers.values())

    def send(self, peer: str, frame: Frame) -> bool:
        """See `Mailbox`."""
        known = self._peers.get(peer)
        if known is not None and known.send(frame):
            return True
        self.dropped.add("no such peer" if known is None else "peer does not read")
        return False

    def close(self) -> None:
        """See `Mailbox`. May be called twice, not from ``receive``."""
        if not self._thread.is_alive():
            return
        self._stop_sender.send(b"")
        self._thread.join()
        with self._lock:
            for peer in self._peers.values():
                peer.close()
        self._stop_sender.close()
        self._guard.close()
        self._context.term()

    def _loop(self, inbox: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        for source in (inbox, self._guard, self._stop_receiver):
            poller.register(source, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._stop_receiver in ready:
                break
            if self._guard in ready:
                self._answer_handshake()
            if inbox in ready:
                self._read(inbox)
        inbox.close()
        self._stop_receiver.close()

    def _answer_handshake(self) -> None:
        """Let a handshake pass whose key belongs to a peer, by ZeroMQ's authentication protocol (RFC 27)."""
        version, request, _domain, _address, _identity, mechanism, *credentials = self._guard.recv_multipart()
        known = mechanism == b"CURVE" and len(credentials) == 1 and z85.encode(credentials[0]) in self._allowed
        if not known:
            self.dropped.add("unknown key")
        verdict = (b"200", b"OK") if known else (b"400", b"unknown key")
        self._guard.send_multipart([version, request, *verdict, b"", b""])

    def _read(self, inbox: zmq.Socket[bytes]) -> None:
        """Read one frame. ``receive`` raises MalformedMessage for a frame whose content makes no sense."""
        parts = [part.buffer for part in inbox.recv_multipart(copy=False)]
        frame = opened(parts, self._session, self.dropped)
        if frame is None:
            return
        try:
            self._receive(frame)
        except MalformedMessage:
            self.dropped.add("malformed")
