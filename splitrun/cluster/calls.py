"""Calls of a keeper's methods, and waiting for what they give, while this process may leave the cluster at any moment.

A thread that waits inside Ray when `ray.shutdown` runs may wait there for ever with its core busy, and a call, or a
reference given up, that falls into that moment ends the whole process. So no thread of ours waits inside Ray, and none
touches it while it shuts down.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from importlib import import_module
from typing import Any

_LOOK_S = 0.25
"""How often whoever waits looks whether this process is still in the cluster: its calls are never answered then."""
_LEFT = "this process has left the cluster"


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Neither joining nor leaving happens inside. Raises RaySystemError once this process has left."""
    import ray
    from ray.exceptions import RaySystemError

    with _joining_or_leaving():
        if not ray.is_initialized():
            raise RaySystemError(_LEFT)
        yield


def _joining_or_leaving() -> contextlib.AbstractContextManager[Any]:
    """What Ray itself holds meanwhile."""
    worker: Any = import_module("ray._private.worker")
    lock: contextlib.AbstractContextManager[Any]
    lock = getattr(worker, "_connect_or_shutdown_lock", contextlib.nullcontext())
    return lock


def asked(method: Any, *arguments: object) -> Future[Any]:
    """Call an actor's method; gives what ``waited`` waits for. Raises RaySystemError once this process has left."""
    with steady():
        answer: Future[Any] = method.remote(*arguments).future()
    return answer


def waited(answer: Future[Any], most_s: float) -> Any:
    """What a call gives; to be asked once more after a GetTimeoutError only.

    Raises RayError: GetTimeoutError after ``most_s``, RaySystemError once this process has left.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RaySystemError

    end = time.monotonic() + most_s
    while not _done(answer, min(_LOOK_S, end - time.monotonic())):
        if not ray.is_initialized():
            raise RaySystemError(_LEFT)
        if time.monotonic() >= end:
            raise GetTimeoutError(f"no answer in {most_s} s")
    with _joining_or_leaving():
        answer.object_ref = None  # type: ignore[attr-defined]  # Ray keeps its reference there
    return answer.result()


def _done(answer: Future[Any], most_s: float) -> bool:
    return not wait([answer], max(0.0, most_s)).not_done
