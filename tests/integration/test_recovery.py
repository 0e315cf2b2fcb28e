"""What a lost stage costs the others, and what may happen meanwhile: the same ids as if nothing had."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from pauses import MOST_S, Pause
from test_processes import GREEDY, PATIENCE, SAMPLED, at_step, demo, process_of, remote_of, restarts, run, undisturbed

import splitrun
from splitrun.cluster.process import StageProcess
from splitrun.engine import lineup
from splitrun.planner.placement import Placement
from splitrun.schedule.request import Request, TokenEvent
from splitrun.transport.frames import Frame, Kind, encode
from splitrun.transport.socket import SocketMailbox

FIRST, LAST = "process/cpu", "process-2/cpu"
PLACEMENT = demo(FIRST, "cpu", LAST)
PROMPTS, OUTPUTS = 90 + 3 + 41 + 20, 4 * 23
"""Tokens that every stage computes when nothing happens."""


def engine_of(placement: Placement) -> splitrun.Engine:
    return splitrun.Engine(placement, chunk_tokens=16, patience=PATIENCE)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[tuple[int, ...]]]:
    return undisturbed()


@pytest.fixture(scope="module")
def engine() -> Iterator[splitrun.Engine]:
    with engine_of(PLACEMENT) as running:
        yield running


def kill(engine: splitrun.Engine, device: str) -> Callable[[], None]:
    return lambda: os.kill(process_of(engine, device).process_id, signal.SIGKILL)


def computed(engine: splitrun.Engine, stage: int = 1) -> int:
    """Tokens that the stage here has computed since the last look."""
    return sum(span.tokens for span in engine.core.take_spans() if span.stage == stage)


IN_FLIGHT = 3 * (16 + 4)
"""Tokens of steps that a loss may catch behind the stage here."""


@pytest.mark.parametrize("device", [pytest.param(FIRST, marks=pytest.mark.long), LAST])
def test_the_others_compute_nothing_again(
    engine: splitrun.Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """But what was under way. The lost stage gets its KV back, and computes the tail of each stream."""
    sent, send, shown = [0], remote_of(engine)._restoration._send, list[int]()

    def counted(stage: int, frame: Any) -> bool:
        sent[0] += frame.body.shape[0]
        return send(stage, frame)

    monkeypatch.setattr(remote_of(engine)._restoration, "_send", counted)
    computed(engine)

    def look_and_kill() -> None:
        shown.extend(stage.kept_bytes for stage in engine.core.status().stages)
        kill(engine, device)()

    at_step(engine, monkeypatch, 25, look_and_kill)
    assert run(engine, SAMPLED) == expected["sampled"]
    assert min(shown[0], shown[2]) > 0 == shown[1]
    assert 0 <= computed(engine) - PROMPTS - OUTPUTS <= IN_FLIGHT
    assert sent[0] > PROMPTS - 4 * 16
    assert remote_of(engine)._kept.nbytes == 0


@pytest.mark.parametrize("journals", [True, pytest.param(False, marks=pytest.mark.long)], ids=["kept", "by all"])
def test_without_room_for_kv_it_is_computed_again(
    expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, journals: bool
) -> None:
    without_room(expected["sampled"], "fp32", journals, [LAST], monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("journals", [True, False], ids=["kept", "by all"])
def test_without_room_in_nf4(monkeypatch: pytest.MonkeyPatch, journals: bool) -> None:
    """One stage after the other is lost."""
    with splitrun.Engine(demo("cpu", weights="nf4"), chunk_tokens=16) as engine:
        expected = run(engine, SAMPLED)
    without_room(expected, "nf4", journals, [LAST, FIRST, LAST], monkeypatch)


def without_room(
    expected: Any, weights: str, journals: bool, losses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lose stages whose KV is kept nowhere: they compute it again, from what was sent to them, or all stages do."""
    nothing = {0: 0, 2: 0}
    monkeypatch.setattr(lineup, "kept_room", lambda *_: nothing)
    monkeypatch.setattr(lineup, "journals_fit", lambda *_: journals)
    with engine_of(demo(FIRST, "cpu", LAST, weights=weights)) as engine:
        computed(engine)
        for device in losses:
            at_step(engine, monkeypatch, 21, kill(engine, device))
            assert run(engine, SAMPLED) == expected
            again = computed(engine) - PROMPTS - OUTPUTS
            assert (again <= IN_FLIGHT) == journals
        assert restarts(engine) == len(losses)


AGAIN = [(number, first, second) for number in (signal.SIGKILL, signal.SIGSTOP) for first in (FIRST, LAST)
         for second in (FIRST, LAST)]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "first", "second"),
    [pytest.param(*one, marks=() if one == AGAIN[1] else pytest.mark.long) for one in AGAIN],
)
def test_a_stage_lost_while_kv_goes_back(
    engine: splitrun.Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, number: int, first: str,
    second: str,
) -> None:  # fmt: skip
    restoration, times, pause = remote_of(engine)._restoration, [], Pause(engine, monkeypatch)
    begin = restoration.begin

    def begin_and_lose(loss: int, held: Any) -> None:
        times.append(loss)
        begin(loss, held)
        if len(times) == 1:
            pause.begin()
            os.kill(process_of(engine, second).process_id, number)

    monkeypatch.setattr(restoration, "begin", begin_and_lose)
    before = restarts(engine)
    at_step(engine, monkeypatch, 22, kill(engine, first))
    assert run(engine) == expected["greedy"]
    assert len(times) == 2
    assert restarts(engine) == before + 2
    assert pause.beyond_loading_s < MOST_S


def truncated(mailbox: SocketMailbox, peer: str, frame: Frame) -> None:
    """Send the header of a frame alone."""
    known = mailbox._peers[peer]
    with known._lock:
        known._sockets[Kind.STEP].send_multipart(encode(frame)[:1])


def forged(mailbox: SocketMailbox, peer: str, frame: Frame) -> None:
    """Send what somebody with a key, but without reason, might."""
    mailbox.send(peer, replace(frame, session=frame.session + 1))
    mailbox.send(peer, replace(frame, stage=99, epoch=1 << 40))
    mailbox.send(peer, replace(frame, kind=Kind.TOKENS, epoch=1 << 40))
    mailbox.send(peer, replace(frame, kind=Kind.KV, control={"request": 1, "start": 0, "slot": 0, "tables": {"x": 9}}))


@pytest.mark.parametrize(
    "fault", [pytest.param("reordered", marks=pytest.mark.long), "replayed", "truncated", "forged"]
)
def test_frames_that_do_not_arrive_as_they_were_sent(
    engine: splitrun.Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """To both processes, in each step. What is behind a gap is computed again; the rest is dropped."""
    mailbox, before, sent, held = remote_of(engine)._mailbox, restarts(engine), [], []
    send = mailbox.send

    def tampered(peer: str, frame: Frame) -> bool:
        sent.append((peer, frame))
        if fault == "reordered" and len(sent) in (9, 10):
            held.append((peer, frame))
            return True
        if len(held) == 2 and peer == held[0][0]:
            send(peer, frame)
            for late in (held.pop(), held.pop()):
                send(*late)
        if len(sent) > 9 and fault == "replayed":
            for early in sent[-9:-6]:
                send(*early)
        for way in {"truncated": [truncated], "forged": [forged]}.get(fault, []):
            if peer in mailbox._peers and len(sent) > 3:
                monkeypatch.setattr(mailbox, "send", send)
                way(mailbox, peer, frame)
                monkeypatch.setattr(mailbox, "send", tampered)
        return send(peer, frame)

    monkeypatch.setattr(mailbox, "send", tampered)
    assert run(engine) == expected["greedy"]
    time.sleep(2 * PATIENCE.beat_s)  # what a process takes for a loss is told by then
    assert (restarts(engine) > before) == (fault == "reordered")


@pytest.mark.long
def test_kv_that_does_not_arrive_is_noticed(
    engine: splitrun.Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    restoration, lost = remote_of(engine)._restoration, []
    send = restoration._send

    def lose_the_first(stage: int, frame: Any) -> bool:
        lost.append(stage)
        return len(lost) == 1 or send(stage, frame)

    monkeypatch.setattr(restoration, "_send", lose_the_first)
    at_step(engine, monkeypatch, 22, kill(engine, FIRST))
    assert run(engine) == expected["greedy"]
    assert lost.count(0) > 1


def test_requests_come_and_go_during_a_recovery(
    engine: splitrun.Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is cancelled while a stage is away, its blocks go to others, and one more arrives."""
    remote, core = remote_of(engine), engine.core
    start = remote._starter
    gone: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    arrived: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    prompt = tuple(range(30))

    def start_and_change(device: str, job: Mapping[str, Any]) -> StageProcess:
        core.cancel(1 << 20)
        core.submit(Request((1 << 20) + 1, prompt, GREEDY), arrived.put)
        process = start(device, job)
        assert isinstance(process, StageProcess)
        return process

    alone = engine.generate([list(prompt)], GREEDY)[0].token_ids
    monkeypatch.setattr(remote, "_starter", start_and_change)
    core.submit(Request(1 << 20, prompt, GREEDY), gone.put)
    gone.get(timeout=60)
    at_step(engine, monkeypatch, 17, kill(engine, FIRST))
    assert run(engine, SAMPLED) == expected["sampled"]
    answer: list[int] = []
    while (event := arrived.get(timeout=60)).finish_reason is None:
        answer += event.token_ids
    assert (*answer, *event.token_ids) == alone
    assert all(use.used == 0 for use in core.status().blocks.values())
    assert remote._kept.nbytes == 0
