"""What a fault of a stage, a device or the engine itself costs: the requests that met it, never the others."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import pytest
import torch
from demo_engine import ANSWERS, QUESTIONS, chat, demo_placement, greedy

import splitrun
import splitrun.schedule.request
from splitrun.errors import StageError
from splitrun.schedule.request import Request, TokenEvent


def test_a_failing_step_costs_only_its_own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that raises once ends the requests of that step with an error; the engine goes on."""
    with splitrun.Engine(demo_placement()) as engine:
        prompt = chat(engine, QUESTIONS[0])
        stage = engine.core.pipeline.links[1].stage
        run = stage.run

        def fail_once(*arguments: object) -> object:
            monkeypatch.setattr(stage, "run", run)
            raise RuntimeError("a made-up fault\nwith a second line")

        monkeypatch.setattr(stage, "run", fail_once)
        with pytest.raises(
            StageError, match=r"stage layers 5–7 \+ head on cpu:1 failed: RuntimeError: a made-up fault$"
        ):
            engine.generate([prompt], greedy())
        assert engine.generate([prompt], greedy())[0].text == ANSWERS[0]
        assert engine.core.status().healthy


def test_health_returns_by_itself_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load balancer sends nothing to an unhealthy engine, so the engine tries its stages itself."""
    with splitrun.Engine(demo_placement()) as engine:
        stage = engine.core.pipeline.links[0].stage
        run = stage.run
        calls = []

        def fail_once(*arguments: Any) -> Any:
            calls.append(engine.core.status().healthy)
            if len(calls) == 1:
                raise RuntimeError("a made-up fault")
            return run(*arguments)

        monkeypatch.setattr(stage, "run", fail_once)
        with pytest.raises(StageError, match="made-up"):
            engine.generate([chat(engine, QUESTIONS[0])], greedy())
        for _ in range(600):
            if engine.core.status().healthy:
                break
            threading.Event().wait(0.05)
        assert engine.core.status().healthy
        assert calls == [True, False]


def test_a_full_device_costs_the_newest_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests fit into a step, a third does not: it ends with what mends it, and the others give their answers
    without a token being computed again."""
    with splitrun.Engine(demo_placement(), depth=1) as engine:
        stage = engine.core.pipeline.links[0].stage
        run = stage.run
        computed: list[tuple[int, int]] = []
        together = threading.Event()
        together.set()

        def run_two(step: Any, incoming: Any) -> Any:
            if step.context_lengths.any():
                assert together.wait(60)  # the first would have ended before the others came
            if step.rows > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            computed.extend(zip(step.requests, step.context_lengths.tolist(), strict=True))
            return run(step, incoming)

        monkeypatch.setattr(stage, "run", run_two)
        expected = [completion.token_ids for completion in engine.generate(asked(engine)[:2], greedy())]
        computed.clear()
        together.clear()
        found: dict[int, list[TokenEvent]] = {901: [], 902: [], 903: []}
        begun, done = threading.Semaphore(0), threading.Semaphore(0)

        def deliver(event: TokenEvent) -> None:
            found[event.request_id].append(event)
            (begun if event.finish_reason is None else done).release()

        for number, prompt in zip(found, asked(engine), strict=True):
            engine.core.submit(Request(number, tuple(prompt), greedy(), tuple(engine.tokenizer.eos_token_ids)), deliver)
            if number == 901:
                assert begun.acquire(timeout=60)  # it has keys and values to lose
        together.set()
        for _ in range(3):
            assert done.acquire(timeout=60)
        assert [events[-1].finish_reason for events in found.values()] == ["stop", "stop", "error"]
        assert "ran out of memory: plan again with --context " in (found[903][-1].error or "")
        answers = [tuple(id_ for event in found[number] for id_ in event.token_ids) for number in (901, 902)]
        assert answers == expected
        assert len(set(computed)) == len(computed)


def asked(engine: splitrun.Engine) -> list[list[int]]:
    """Three prompts."""
    return [chat(engine, question) for question in QUESTIONS[:3]]


def test_one_fault_after_the_other_costs_only_the_steps_that_met_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own trial of its stages waits behind two requests when the next fault comes."""
    with splitrun.Engine(demo_placement(sessions=1), depth=1) as engine:
        stage = engine.core.pipeline.links[0].stage
        run, all_wait, calls = stage.run, threading.Event(), []

        def fail_twice(*arguments: Any) -> Any:
            assert all_wait.wait(60)
            calls.append(arguments)
            if len(calls) <= 2:
                raise RuntimeError("a made-up fault")
            return run(*arguments)

        monkeypatch.setattr(stage, "run", fail_twice)
        ends: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        for number in (911, 912, 913):
            engine.core.submit(Request(number, (3, 4), greedy(max_tokens=1, ignore_eos=True)), ends.put)
        all_wait.set()
        found = [ends.get(timeout=60) for _ in range(3)]
        assert [(event.request_id, event.finish_reason) for event in found] == [
            (911, "error"), (912, "error"), (913, "length"),
        ]  # fmt: skip
        assert engine.generate([chat(engine, QUESTIONS[0])], greedy())[0].text == ANSWERS[0]


def test_closing_leaves_a_stuck_stage_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitrun.engine.pipeline.CLOSING_S", 0.2)
    engine = splitrun.Engine(demo_placement())
    stuck = threading.Event()
    reached = threading.Event()

    def hang(*arguments: Any) -> None:
        reached.set()
        stuck.wait(60)

    monkeypatch.setattr(engine.core.pipeline.links[0].stage, "run", hang)
    engine.core.submit(splitrun.schedule.request.Request(7, (3,), greedy()), lambda event: None)
    assert reached.wait(60)
    engine.close()
    stuck.set()


def test_an_internal_error_ends_requests_instead_of_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop dies on our own bug: whoever waits is told, and new requests are refused."""
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    with splitrun.Engine(demo_placement()) as engine:
        monkeypatch.setattr(engine.core._scheduler, "commit", lambda tokens: 1 / 0)
        prompt = chat(engine, QUESTIONS[0])
        for _ in range(2):
            with pytest.raises(StageError, match=r"internal error|shutting down"):
                engine.generate([prompt], greedy())
        assert not engine.core.status().healthy


def test_what_was_committed_is_handed_out_before_the_engine_closes() -> None:
    """A receiver slower than the stages: every token and the end reach it, though the engine is closed at once."""
    engine = splitrun.Engine(demo_placement())
    events: list[TokenEvent] = []

    def slowly(event: TokenEvent) -> None:
        time.sleep(0.03)
        events.append(event)

    engine.core.submit(Request(77, (5, 6, 7), greedy(max_tokens=12, ignore_eos=True)), slowly)
    engine.core.drain()
    engine.close()
    assert sum(len(event.token_ids) for event in events) == 12
    assert [event.finish_reason for event in events if event.finish_reason] == ["length"]
    assert events[-1].finish_reason == "length"


def test_a_cancelled_request_gets_nothing_of_what_was_committed() -> None:
    """A receiver that cancels while further tokens of its request wait to be handed out."""
    with splitrun.Engine(demo_placement()) as engine:
        core, ids = engine.core, list[int]()
        cancelled = threading.Event()

        def once(event: TokenEvent) -> None:
            ids.extend(event.token_ids)
            until = time.monotonic() + 60
            while sum(due.request_id == 78 for _, due in list(core._receivers._due)) < 3 and time.monotonic() < until:
                time.sleep(0.001)
            core.cancel(78)
            cancelled.set()

        core.submit(Request(78, (5, 6, 7), greedy(max_tokens=40, ignore_eos=True)), once)
        assert cancelled.wait(90)
        assert engine.generate([chat(engine, QUESTIONS[0])], greedy())[0].text == ANSWERS[0]
        assert len(ids) == 1
