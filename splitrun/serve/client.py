"""The HTTP process's end of the socket to the engine: submit, cancel, status, and noticing when the engine is gone.

Everything runs in one asyncio loop. Knows nothing of text or of HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

import zmq
import zmq.asyncio

from splitrun.engine.interface import EngineStatus
from splitrun.errors import ContextTooLong, InvalidRequest, QueueFull, SplitrunError, StageError, StageLost
from splitrun.schedule.request import Request, SamplingParams, TokenEvent
from splitrun.serve.service import Address
from splitrun.serve.wire import (
    MAX_MESSAGE_BYTES,
    Kind,
    MalformedMessage,
    Message,
    decode,
    encode,
    event_of,
    submit_message,
)

_REFUSALS: dict[str, type[SplitrunError]] = {
    "ContextTooLong": ContextTooLong,
    "QueueFull": QueueFull,
    "InvalidRequest": InvalidRequest,
    "StageLost": StageLost,
}
AT_ONCE = 32
"""Messages or events that are taken up before others have a turn: to take what is there already gives nobody one."""
_Item = TokenEvent | bytes | SplitrunError
"""What waits for a reader: an event, one as its message, or the error that ends the request."""
_LOST = "the engine does not answer; look at the server's log and restart it"


class EngineClient:
    """Talks to an ``EngineService``. Create and use it inside a running event loop.

    ``beat_s`` is how often the status is asked for; ``silence_s`` how long the engine may be silent before it counts
    as dead, which fails every running request.
    """

    def __init__(self, address: Address, beat_s: float = 1.0, silence_s: float = 30.0) -> None:
        self._address = address
        self._beat_s = beat_s
        self._silence_s = silence_s
        self._context = zmq.asyncio.Context()
        identity = secrets.token_bytes(16)
        self._control, self._events = (self._socket(identity) for _ in range(2))
        self._streams: dict[int, asyncio.Queue[_Item]] = {}
        # From a random number on, so that the requests of two processes are never taken for each other.
        self._ids = itertools.count(secrets.randbits(40) << 20)
        self._status = EngineStatus(False, "the engine has not answered yet")
        self._silent_beats = 0
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.dropped_messages = 0

    async def open(self, timeout_s: float = 20.0) -> None:
        """Connect, introduce this process, start listening; raises StageLost when the engine does not answer."""
        self._events.connect(self._address.events)
        self._control.connect(self._address.control)
        self._tasks = [
            asyncio.create_task(self._listen(self._control), name="engine-control"),
            asyncio.create_task(self._listen(self._events), name="engine-events"),
            asyncio.create_task(self._beat(), name="engine-beat"),
        ]
        await self._greet()
        try:
            await asyncio.wait_for(self._news.wait(), timeout_s)
        except TimeoutError as error:
            raise StageLost(_LOST) from error

    async def close(self) -> None:
        """Stop listening and close the sockets."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._control.close(linger=200)
        self._events.close(linger=0)
        self._context.term()

    @property
    def status(self) -> EngineStatus:
        """What the engine last said of itself; unhealthy when it has been silent for too long."""
        return EngineStatus(False, _LOST) if self._is_silent else self._status

    @property
    def _is_silent(self) -> bool:
        # Counted in beats, not by the clock: when this process itself was held up, the answers lie unread.
        return self._silent_beats * self._beat_s > self._silence_s

    async def fresh_status(self, timeout_s: float = 2.0) -> EngineStatus:
        """Ask now; unhealthy when no answer comes in time."""
        self._news.clear()
        await self._greet()
        try:
            await asyncio.wait_for(self._news.wait(), timeout_s)
        except TimeoutError:
            return EngineStatus(False, _LOST)
        return self._status

    def submit(
        self, prompt: Sequence[int], samplings: Sequence[SamplingParams], eos_token_ids: tuple[int, ...]
    ) -> EventStream:
        """Ask for one completion of a prompt per sampling; use the result as an asynchronous context manager."""
        return self.submit_all([(prompt, sampling) for sampling in samplings], eos_token_ids)

    def submit_all(
        self, wishes: Sequence[tuple[Sequence[int], SamplingParams]], eos_token_ids: tuple[int, ...]
    ) -> EventStream:
        """Ask for one completion per (prompt, sampling)."""
        requests = [Request(next(self._ids), tuple(prompt), sampling, eos_token_ids) for prompt, sampling in wishes]
        return EventStream(self, requests)

    async def start(self, requests: Sequence[Request], queue: asyncio.Queue[_Item]) -> None:
        """Send requests; their events, or the error that ends them, come in the queue.

        Raises InvalidRequest, and sends none of them, when one does not fit a message.
        """
        try:
            messages = [encode(submit_message(request)) for request in requests]
        except MalformedMessage as error:
            raise InvalidRequest(f"the request cannot be handed to the engine: {error}") from error
        self._streams |= dict.fromkeys((request.request_id for request in requests), queue)
        for message in messages:
            await self._control.send(message)

    async def cancel(self, request_ids: Sequence[int]) -> None:
        """Stop these requests if they still run. No event follows."""
        for request_id in request_ids:
            if self._streams.pop(request_id, None) is not None:
                await self._send(Message(Kind.CANCEL, request_id))

    async def end_all(self, error: SplitrunError) -> None:
        """Stop every request that still runs; whoever waits for one gets the error."""
        for request_id in list(self._streams):
            self._put(request_id, error, last=True)
            await self._send(Message(Kind.CANCEL, request_id))

    def _socket(self, identity: bytes) -> zmq.asyncio.Socket:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, identity)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        return socket

    async def _send(self, message: Message) -> None:
        await self._control.send(encode(message))

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        for number in itertools.count(1):
            data = await socket.recv()
            try:
                self._handle(decode(data), data)
            except MalformedMessage:
                self.dropped_messages += 1
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)

    def _handle(self, message: Message, data: bytes) -> None:
        self._silent_beats = 0
        if message.kind is Kind.STATUS:
            try:
                self._status = EngineStatus.from_json(message.control)
            except (TypeError, KeyError, AttributeError, ValueError) as error:
                raise MalformedMessage("the status is malformed") from error
            self._news.set()
        elif message.kind is Kind.EVENT:
            event = event_of(message)
            queue = self._streams.get(event.request_id)
            # One that must wait behind others does so as it came, in a sixth of the bytes.
            waiting = data if queue is not None and not queue.empty() else event
            self._put(event.request_id, waiting, last=event.finish_reason is not None)
        elif message.kind is Kind.REFUSED:
            error_type = _REFUSALS.get(str(message.control.get("error")), StageError)
            self._put(message.request_id, error_type(str(message.control.get("message"))), last=True)
        else:
            raise MalformedMessage(f"{message.kind.name} is not for the HTTP process")

    def _put(self, request_id: int, item: _Item, *, last: bool) -> None:
        queue = self._streams.pop(request_id, None) if last else self._streams.get(request_id)
        if queue is not None:
            queue.put_nowait(item)

    async def _greet(self) -> None:
        await self._send(Message(Kind.HELLO, 0, {"token": self._address.token}))

    async def _beat(self) -> None:
        """Keep both ends sure of each other; when the engine is silent for too long, fail what waits for it."""
        while True:
            await asyncio.sleep(self._beat_s)
            await self._greet()
            self._silent_beats += 1
            if self._is_silent:
                for request_id in list(self._streams):
                    self._put(request_id, StageLost(_LOST), last=True)


class EventStream:
    """The events of some requests, merged in order of arrival. Leaving it cancels whatever still runs.

    ``request_ids`` are in the order of the wishes. Iterating raises the engine's refusal, ContextTooLong and the
    like, or StageLost when the engine is gone.
    """

    def __init__(self, client: EngineClient, requests: Sequence[Request]) -> None:
        self._client = client
        self._requests = requests
        self._open = {request.request_id for request in requests}
        self._queue: asyncio.Queue[_Item] = asyncio.Queue()
        self.request_ids = [request.request_id for request in requests]

    async def __aenter__(self) -> EventStream:
        await self._client.start(self._requests, self._queue)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Shielded: a cancelled task (the client hung up) must still free the blocks.
        await asyncio.shield(asyncio.ensure_future(self._client.cancel(list(self._open))))

    async def finish(self, request_id: int) -> None:
        """Cancel one request, whose text met a stop string."""
        self._open.discard(request_id)
        await self._client.cancel([request_id])

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        for number in itertools.count(1):
            if not self._open:
                return
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            item = await self._queue.get()
            if isinstance(item, SplitrunError):
                raise item
            if isinstance(item, bytes):
                item = event_of(decode(item))
            if item.request_id not in self._open:
                continue
            if item.finish_reason is not None:
                self._open.discard(item.request_id)
            yield item
