"""The socket between HTTP process and engine: same events, refusals, cancellation, garbage, death on either side."""

from __future__ import annotations

import asyncio
import stat
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import zmq
from fake_engine import FakeEngine, next_token

from splitrun.errors import ContextTooLong, InvalidRequest, QueueFull, StageError, StageLost
from splitrun.schedule.request import Request, SamplingParams, TokenEvent, TokenLogprob
from splitrun.serve.client import AT_ONCE, EngineClient
from splitrun.serve.service import Address, EngineService
from splitrun.serve.wire import Kind, Message, decode, encode, event_message, submit_message

T = TypeVar("T")
GREEDY = SamplingParams(max_tokens=5, temperature=0, seed=0)
GARBAGE = [b"", b"x", b"SPLR", b"\0" * 100, encode(Message(Kind.EVENT)), encode(Message(Kind.SUBMIT, 3, {"n": "x"}))]


@contextmanager
def bridge(engine: FakeEngine | None, silence_s: float = 30.0) -> Iterator[EngineService]:
    service = EngineService(engine, peer_silence_s=silence_s)
    try:
        yield service
    finally:
        service.close()
        if engine is not None:
            engine.close()


def talk(address: Address, work: Callable[[EngineClient], Awaitable[T]]) -> T:
    async def run() -> T:
        client = EngineClient(address)
        await client.open()
        try:
            return await asyncio.wait_for(work(client), 20)
        finally:
            await client.close()

    return asyncio.run(run())


async def tokens_of(client: EngineClient, prompt: list[int], sampling: SamplingParams = GREEDY) -> list[int]:
    ids: list[int] = []
    async with client.submit(prompt, [sampling], (4,)) as events:
        async for event in events:
            ids += event.token_ids
    return ids


def expected_tokens(prompt: list[int], count: int = 5) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, GREEDY, 400))
    return ids[len(prompt) :]


def test_concurrent_requests_get_their_own_tokens() -> None:
    prompts = [[10 + index, 20] for index in range(20)]

    async def work(client: EngineClient) -> list[list[int]]:
        return await asyncio.gather(*[tokens_of(client, prompt) for prompt in prompts])

    with bridge(FakeEngine()) as service:
        assert talk(service.address, work) == [expected_tokens(prompt) for prompt in prompts]


def test_events_that_wait_for_a_slow_reader_are_small_and_lose_nothing() -> None:
    """Read into objects, one with its three likeliest tokens takes 900 bytes."""
    count = 2000
    sampling = SamplingParams(max_tokens=count, temperature=0, seed=0, logprobs=3)
    engine = FakeEngine(context=count + 10)

    had = 0

    async def turns() -> None:
        nonlocal had
        while True:
            had += 1
            await asyncio.sleep(0)

    async def work(client: EngineClient) -> tuple[float, list[TokenEvent]]:
        async with client.submit([1, 2], [sampling], (4,)) as events:
            tracemalloc.start()
            try:
                while client._streams:
                    await asyncio.sleep(0.01)
                taken = tracemalloc.get_traced_memory()[0]
            finally:
                tracemalloc.stop()
            others = asyncio.create_task(turns())
            found = [event async for event in events]
            others.cancel()
            return taken / count, found

    with bridge(engine) as service:
        engine.hold()
        asker = threading.Timer(0.2, engine.release)
        asker.start()
        each, events = talk(service.address, work)
    assert each < 400
    assert had > count / AT_ONCE / 2  # whoever reads them leaves others their turns
    assert [event.token_ids[0] for event in events] == expected_tokens([1, 2], count)
    assert {len(event.logprobs[0].top) for event in events} == {3}
    assert [event.finish_reason for event in events[-2:]] == [None, "length"]


def test_the_engine_hears_exactly_what_was_asked() -> None:
    sampling = SamplingParams(max_tokens=2, temperature=0.5, logit_bias={7: -3.5}, stop=("x",), seed=2**63)
    engine = FakeEngine()
    with bridge(engine) as service:
        talk(service.address, lambda client: tokens_of(client, [1, 2], sampling))
    heard = engine.submitted[0]
    assert (heard.prompt, heard.sampling, heard.eos_token_ids) == ((1, 2), sampling, (4,))


@pytest.mark.parametrize(
    ("engine", "prompt", "error"),
    [
        (FakeEngine(context=8), [1] * 8, ContextTooLong),
        (FakeEngine(queue=0), [1], QueueFull),
        (None, [1], StageError),
    ],
    ids=["context", "queue", "loading"],
)
def test_refusals_keep_their_type(engine: FakeEngine | None, prompt: list[int], error: type[Exception]) -> None:
    with bridge(engine) as service, pytest.raises(error):
        talk(service.address, lambda client: tokens_of(client, prompt))


def test_a_dead_engine_refuses_and_is_unhealthy() -> None:
    engine = FakeEngine()
    engine.dead = "stage 1 (cpu) is lost: restart"

    async def work(client: EngineClient) -> None:
        status = await client.fresh_status()
        assert (status.healthy, status.reason) == (False, engine.dead)
        with pytest.raises(StageLost, match="stage 1"):
            await tokens_of(client, [1])

    with bridge(engine) as service:
        talk(service.address, work)


def test_the_status_survives_the_trip() -> None:
    engine = FakeEngine()
    with bridge(engine) as service:
        assert talk(service.address, lambda client: client.fresh_status()) == engine.status()


def test_leaving_a_stream_cancels_what_runs_and_leaves_the_rest_alone() -> None:
    engine = FakeEngine(context=10_000_000)

    asked: list[int] = []

    async def work(client: EngineClient) -> list[int]:
        async with client.submit([1], [SamplingParams(max_tokens=9_000_000)] * 2, ()) as events:
            asked.extend(events.request_ids)
            async for event in events:
                if event.request_id == events.request_ids[1]:
                    break
        return await tokens_of(client, [10, 20])

    with bridge(engine) as service:
        assert talk(service.address, work) == expected_tokens([10, 20])
        assert engine.wait_for(lambda: sorted(engine.cancelled) == asked)


def test_a_finished_choice_is_cancelled_alone() -> None:
    engine = FakeEngine(context=10_000_000)

    async def work(client: EngineClient) -> int:
        endless, short = SamplingParams(max_tokens=9_000_000), SamplingParams(max_tokens=3)
        async with client.submit([1], [endless, short], ()) as events:
            await events.finish(events.request_ids[0])
            return sum([len(event.token_ids) async for event in events])

    with bridge(engine) as service:
        assert talk(service.address, work) == 3
        assert engine.cancelled == [engine.submitted[0].request_id]


def test_of_requests_that_do_not_all_fit_a_message_none_runs() -> None:
    """Nobody would wait for the others, nor cancel them."""
    engine = FakeEngine(context=10_000_000)

    async def work(client: EngineClient) -> list[int]:
        endless = SamplingParams(max_tokens=9_000_000)
        with pytest.raises(InvalidRequest, match="cannot be handed to the engine"):
            async with client.submit_all([([1], endless), ([2**40], endless)], ()):
                pass
        return await tokens_of(client, [10, 20])

    with bridge(engine) as service:
        assert talk(service.address, work) == expected_tokens([10, 20])
        assert [request.prompt for request in engine.submitted] == [(10, 20)]


def test_closing_the_service_cancels_what_runs() -> None:
    engine = FakeEngine(context=10_000_000)
    with bridge(engine) as service, raw_peer(service.address) as peer:
        peer(Message(Kind.HELLO, 0, {"token": service.address.token}))
        peer(submit_message(Request(9, (1,), SamplingParams(max_tokens=9_000_000))))
        assert engine.wait_for(lambda: len(engine.submitted) == 1)
        service.close()
        assert engine.cancelled == [9]


@contextmanager
def raw_peer(address: Address) -> Iterator[Callable[[Message | bytes], None]]:
    """A peer that says what it is told. Sends bytes as they are; waits for the welcome after a hello."""
    context = zmq.Context()
    sockets = [context.socket(zmq.DEALER) for _ in range(2)]
    for socket, where in zip(sockets, (address.control, address.events), strict=True):
        socket.setsockopt(zmq.IDENTITY, b"raw peer")
        socket.connect(where)

    def send(message: Message | bytes) -> None:
        sockets[0].send(message if isinstance(message, bytes) else encode(message))
        if isinstance(message, Message) and message.control.get("token") == address.token:
            assert decode(sockets[1].recv()).kind is Kind.STATUS

    try:
        yield send
    finally:
        context.destroy(linger=0)


def test_garbage_does_not_stop_the_service() -> None:
    with bridge(FakeEngine()) as service, raw_peer(service.address) as peer:
        for data in GARBAGE:
            peer(data)
        peer(Message(Kind.HELLO, 0, {"token": service.address.token}))
        for data in GARBAGE:
            peer(data)
        assert talk(service.address, lambda client: tokens_of(client, [10, 20])) == expected_tokens([10, 20])
        assert service.dropped_messages >= len(GARBAGE)


@pytest.mark.parametrize("token", ["wrong", "", None, 5, ["x"]])
def test_a_peer_without_the_token_is_not_heard(token: object) -> None:
    engine = FakeEngine()
    with bridge(engine) as service, raw_peer(service.address) as peer:
        peer(Message(Kind.HELLO, 0, {"token": token}))
        peer(submit_message(Request(1, (1,), GREEDY)))
        talk(service.address, lambda client: tokens_of(client, [10, 20]))
        assert [request.prompt for request in engine.submitted] == [(10, 20)]


def test_one_peer_cannot_cancel_anothers_request() -> None:
    engine = FakeEngine()
    engine.hold()

    async def work(client: EngineClient) -> list[int]:
        task = asyncio.create_task(tokens_of(client, [10, 20]))
        await asyncio.to_thread(engine.wait_for, lambda: len(engine.submitted) == 1)
        peer(Message(Kind.CANCEL, engine.submitted[0].request_id))
        peer(submit_message(Request(77, (1,), GREEDY)))
        await asyncio.to_thread(engine.wait_for, lambda: len(engine.submitted) == 2)
        engine.release()
        return await task

    with bridge(engine) as service, raw_peer(service.address) as peer:
        peer(Message(Kind.HELLO, 0, {"token": service.address.token}))
        assert talk(service.address, work) == expected_tokens([10, 20])


def test_a_silent_peers_requests_are_cancelled() -> None:
    engine = FakeEngine(context=10_000_000)
    with bridge(engine, silence_s=0.5) as service, raw_peer(service.address) as peer:
        peer(Message(Kind.HELLO, 0, {"token": service.address.token}))
        peer(submit_message(Request(9, (1,), SamplingParams(max_tokens=9_000_000))))
        assert engine.wait_for(lambda: engine.cancelled == [9])


def test_a_peer_that_was_given_up_comes_back() -> None:
    engine = FakeEngine(context=10_000_000)

    async def work(client: EngineClient) -> list[int]:
        async with client.submit([1], [SamplingParams(max_tokens=9_000_000)], ()) as events:
            last = [event async for event in events][-1]
        assert last.error == "cancelled after 0.1 s of silence"
        while not (await client.fresh_status(timeout_s=0.05)).healthy:
            continue
        return await tokens_of(client, [10, 20])

    with bridge(engine, silence_s=0.1) as service:
        assert talk(service.address, work) == expected_tokens([10, 20])


def test_an_event_that_does_not_fit_fails_its_request_alone() -> None:
    engine = FakeEngine(script=[2**40])

    async def work(client: EngineClient) -> list[TokenEvent]:
        async with client.submit([1], [GREEDY], ()) as events:
            return [event async for event in events]

    with bridge(engine) as service:
        assert talk(service.address, work)[-1].finish_reason == "error"
        assert engine.wait_for(lambda: engine.cancelled == [engine.submitted[0].request_id])


def test_prompt_log_probabilities_arrive_once() -> None:
    async def work(client: EngineClient) -> list[object]:
        async with client.submit([6, 8], [SamplingParams(max_tokens=2, prompt_logprobs=1)], ()) as events:
            return [event.prompt_logprobs async for event in events]

    with bridge(FakeEngine()) as service:
        first, second = talk(service.address, work)
        assert second is None
        assert isinstance(first, tuple)
        assert first[0] is None
        assert isinstance(first[1], TokenLogprob)


class MuteEngineSide:
    """The engine's two sockets in the hands of a test."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self.control, self.events = (self._context.socket(zmq.ROUTER) for _ in range(2))
        ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (self.control, self.events)]
        self.address = Address(*[f"tcp://127.0.0.1:{port}" for port in ports], token="t")

    def welcome(self) -> bytes:
        """Answer the hello; the peer's identity."""
        peer, hello = self.control.recv_multipart()
        assert decode(hello).kind is Kind.HELLO
        status = encode(Message(Kind.STATUS, 0, {"healthy": True}))
        self.events.setsockopt(zmq.ROUTER_MANDATORY, 1)
        while True:
            try:
                self.events.send_multipart([peer, status])
            except zmq.ZMQError:
                continue
            return peer

    def close(self) -> None:
        self._context.destroy(linger=0)


def with_mute_engine(work: Callable[[EngineClient, MuteEngineSide, bytes], Awaitable[None]], silence_s: float) -> None:
    async def run() -> None:
        side = MuteEngineSide()
        client = EngineClient(side.address, beat_s=0.02, silence_s=silence_s)
        welcome = asyncio.create_task(asyncio.to_thread(side.welcome))
        await client.open()
        try:
            await asyncio.wait_for(work(client, side, await welcome), 20)
        finally:
            await client.close()
            side.close()

    asyncio.run(run())


def test_a_silent_engine_fails_what_waits_for_it() -> None:
    async def work(client: EngineClient, side: MuteEngineSide, peer: bytes) -> None:
        with pytest.raises(StageLost, match="does not answer"):
            await tokens_of(client, [1])
        assert not client.status.healthy
        assert not (await client.fresh_status(timeout_s=0.01)).healthy

    with_mute_engine(work, silence_s=0.1)


def test_a_flood_of_events_leaves_others_their_turns() -> None:
    """An answer, or the end of the process, would wait for the last of them."""
    count = 2000

    async def work(client: EngineClient, side: MuteEngineSide, peer: bytes) -> None:
        event = encode(event_message(TokenEvent(1, (5,))))
        for _ in range(count):
            side.events.send_multipart([peer, event])
        side.events.send_multipart([peer, encode(Message(Kind.STATUS, 0, {"healthy": False, "reason": "after"}))])
        time.sleep(0.5)  # until they lie in the socket
        turns = 0
        while client.status.reason != "after":
            turns += 1
            await asyncio.sleep(0)
        assert turns > count / AT_ONCE / 2

    with_mute_engine(work, silence_s=30)


def test_garbage_does_not_stop_the_client() -> None:
    async def work(client: EngineClient, side: MuteEngineSide, peer: bytes) -> None:
        bad = [*GARBAGE, encode(Message(Kind.STATUS, 0, {"blocks": 5})), encode(Message(Kind.EVENT, 1, {}, [9]))]
        for data in bad:
            side.events.send_multipart([peer, data])
        side.control.send_multipart([peer, encode(Message(Kind.STATUS, 0, {"healthy": False, "reason": "after"}))])
        while client.status.reason != "after" or client.dropped_messages < len(bad):
            await asyncio.sleep(0)

    with_mute_engine(work, silence_s=30)


def test_an_engine_that_never_answers_is_lost() -> None:
    async def run() -> None:
        side = MuteEngineSide()
        client = EngineClient(side.address)
        with pytest.raises(StageLost):
            await client.open(timeout_s=0.05)
        await client.close()
        side.close()

    asyncio.run(run())


def test_the_sockets_lie_where_only_this_user_may_go() -> None:
    with bridge(None) as service:
        directory = Path(service.address.control.removeprefix("ipc://")).parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not directory.exists()


def test_an_invalid_request_is_refused_by_the_engines_side_too() -> None:
    async def work(client: EngineClient) -> list[int]:
        broken = object.__new__(SamplingParams)
        for name, value in {**vars(GREEDY), "top_p": 7.0}.items():
            object.__setattr__(broken, name, value)
        return await tokens_of(client, [1], broken)

    with bridge(FakeEngine()) as service, pytest.raises(InvalidRequest, match="top_p"):
        talk(service.address, work)
