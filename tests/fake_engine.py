"""An engine without a model: the next token is a fixed function of the ids so far. Runs in its own thread.

It obeys the ``TokenEngine`` protocol, so the whole HTTP side can be tested without weights. Settings make it slow,
full, dead or failing on purpose. ``python fake_engine.py MODEL_DIRECTORY PORT`` serves it.
"""

from __future__ import annotations

import math
import random
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from splitrun.engine.interface import BlockUse, EngineStatus, StageStatus
from splitrun.errors import ContextTooLong, QueueFull, StageLost
from splitrun.schedule.request import Request, SamplingParams, TokenEvent, TokenLogprob


def next_token(ids: Sequence[int], sampling: SamplingParams, vocabulary: int) -> int:
    """Greedy: a function of the last two ids alone. Otherwise also of the seed. Never a special id (0 to 4)."""
    seed = 0 if sampling.temperature == 0 else sampling.seed
    return 5 + random.Random(f"{seed} {ids[-2:]}").randrange(vocabulary - 5)


@dataclass
class _Running:
    request: Request
    deliver: Callable[[TokenEvent], None]
    made: list[int] = field(default_factory=list)


class FakeEngine:
    """Deterministic tokens. ``script`` replaces them for every request, ``step`` makes it wait for ``release``.

    ``cancelled`` lists the request ids that were cancelled, ``submitted`` every request.
    """

    def __init__(
        self, vocabulary: int = 400, context: int = 256, queue: int = 64, script: Sequence[int] | None = None
    ) -> None:
        self._vocabulary = vocabulary
        self._context = context
        self.queue = queue
        self.script = script
        self._requests: dict[int, _Running] = {}
        self._changed = threading.Condition()
        self._draining = False
        self._closed = False
        self._held = False
        self._pause_at: int | None = None
        self._completion_tokens = 0
        self.dead = ""
        self.fail_with = ""
        self.submitted: list[Request] = []
        self.cancelled: list[int] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def context(self) -> int:
        return self._context

    @property
    def running(self) -> set[int]:
        """Ids of the requests that are neither finished nor cancelled."""
        return set(self._requests)

    @property
    def vocabulary(self) -> int:
        return self._vocabulary

    def submit(self, request: Request, deliver: Callable[[TokenEvent], None]) -> None:
        with self._changed:
            if self.dead or self._draining:
                raise StageLost(self.dead or "the engine is draining: try again later")
            if len(request.prompt) + (request.sampling.max_tokens or 1) > self._context:
                raise ContextTooLong(f"the prompt and new tokens exceed the context of {self._context}")
            if len(self._requests) >= self.queue:
                raise QueueFull(f"{self.queue} requests are waiting: try again later")
            self.submitted.append(request)
            self._requests[request.request_id] = _Running(request, deliver)
            self._changed.notify_all()

    def cancel(self, request_id: int) -> None:
        with self._changed:
            if self._requests.pop(request_id, None) is not None:
                self.cancelled.append(request_id)
            self._changed.notify_all()

    def status(self) -> EngineStatus:
        with self._changed:
            return EngineStatus(
                healthy=not self.dead, reason=self.dead, context=self._context, vocabulary=self._vocabulary,
                running=len(self._requests), blocks={"full": BlockUse(len(self._requests), 64)},
                completion_tokens=self._completion_tokens,
                stages=(StageStatus("cpu", "embed, layers 0-8, head", 1 << 20, 1.5, 1.25),),
                placement={"version": 1},
            )  # fmt: skip

    def drain(self) -> None:
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self._requests)

    def hold(self) -> None:
        """Make no tokens until ``release``."""
        with self._changed:
            self._held = True

    def release(self) -> None:
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def pause_at(self, tokens: int | None) -> None:
        """Let every request stand once it has so many tokens; None goes on."""
        with self._changed:
            self._pause_at = tokens
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Wait until something holds that requests or cancellations change."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or bool(self._movable()))
                if self._closed:
                    return
                events = [(running.deliver, self._step(running)) for running in self._movable()]
                self._changed.notify_all()
            for deliver, event in events:
                deliver(event)

    def _movable(self) -> list[_Running]:
        limit = math.inf if self._pause_at is None else self._pause_at
        return [] if self._held else [each for each in self._requests.values() if len(each.made) < limit]

    def _step(self, running: _Running) -> TokenEvent:
        request = running.request
        if self.fail_with:
            del self._requests[request.request_id]
            return TokenEvent(request.request_id, finish_reason="error", error=self.fail_with)
        sampling = request.sampling
        if self.script is None:
            token = next_token([*request.prompt, *running.made], sampling, self._vocabulary)
        else:
            token = self.script[len(running.made) % len(self.script)]
        running.made.append(token)
        self._completion_tokens += 1
        limit = sampling.max_tokens or self._context - len(request.prompt)
        ends = () if sampling.ignore_eos else request.eos_token_ids
        finish = "stop" if token in (*ends, *sampling.stop_token_ids) else None
        if finish is None and len(running.made) >= limit:
            finish = "length"
        if finish is not None:
            del self._requests[request.request_id]
        prompt = None
        if sampling.prompt_logprobs is not None and len(running.made) == 1:
            prompt = (None, *[_logprob(token, sampling.prompt_logprobs) for token in request.prompt[1:]])
        logprobs = () if sampling.logprobs is None else (_logprob(token, sampling.logprobs),)
        return TokenEvent(request.request_id, (token,), logprobs, prompt, finish)


def _logprob(token: int, count: int) -> TokenLogprob:
    """Even tokens are the likeliest of their place, odd ones come second."""
    first, second = (token, token + 1) if token % 2 == 0 else (token - 1, token)
    top = ((first, math.log(0.7)), (second, math.log(0.2)), (token + 2, float("-inf")))[:count]
    return TokenLogprob(token, math.log(0.7 if token % 2 == 0 else 0.2), top)


def main() -> None:
    from splitrun.serve.launcher import ServeOptions, Server

    engine = FakeEngine(context=100_000)
    if "--hold" in sys.argv:
        engine.hold()
        threading.Thread(target=lambda: (sys.stdin.readline(), engine.release()), daemon=True).start()
    with Server(ServeOptions(sys.argv[1], "fake", port=0, drain_s=20)) as server:
        server.attach(engine)
        server.wait_ready()
        print(server.url, server.process_id, flush=True)
        server.wait()
    print("ended", flush=True)


if __name__ == "__main__":
    main()
