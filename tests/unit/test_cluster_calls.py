"""Calls to Ray while this process may leave the cluster: nobody waits for ever, nobody calls in the middle of it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import worker
from ray.exceptions import ActorDiedError, GetTimeoutError, RaySystemError

from splitrun.cluster.calls import asked, steady, waited


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Whether this process is in a cluster, for as long as it is set."""
    here = threading.Event()
    here.set()
    monkeypatch.setattr(ray, "is_initialized", here.is_set)
    return here


def method(answer: Future[Any]) -> Any:
    """An actor's method that is answered by that."""
    return SimpleNamespace(remote=lambda *_: SimpleNamespace(future=lambda: answer))


def test_an_answer_is_given_and_a_failure_is_raised(joined: threading.Event) -> None:
    answered: Future[int] = Future()
    answered.set_result(7)
    assert waited(asked(method(answered)), 1) == 7
    failed: Future[int] = Future()
    failed.set_exception(ActorDiedError())
    with pytest.raises(ActorDiedError):
        waited(asked(method(failed)), 1)


def test_a_late_answer_can_be_waited_for_again(joined: threading.Event) -> None:
    late: Future[int] = Future()
    with pytest.raises(GetTimeoutError, match=r"no answer in 0.05 s"):
        waited(late, 0.05)
    threading.Timer(0.1, late.set_result, (3,)).start()
    assert waited(late, 10) == 3


def test_who_waits_learns_that_this_process_has_left(joined: threading.Event) -> None:
    never: Future[int] = Future()
    began = time.monotonic()
    threading.Timer(0.1, joined.clear).start()
    with pytest.raises(RaySystemError, match="has left the cluster"):
        waited(never, 60)
    assert time.monotonic() - began < 20


def test_nobody_calls_after_leaving_or_in_the_middle_of_it(joined: threading.Event) -> None:
    called: Future[int] = Future()
    called.set_result(1)
    refused: list[RaySystemError] = []

    def call() -> None:
        try:
            asked(method(called))
        except RaySystemError as error:
            refused.append(error)

    with worker._connect_or_shutdown_lock:  # as `ray.shutdown` does
        caller = threading.Thread(target=call)
        caller.start()
        caller.join(0.2)
        assert caller.is_alive()
        joined.clear()
    caller.join(20)
    assert len(refused) == 1
    with pytest.raises(RaySystemError), steady():
        pass
