"""`splitrun.Engine`: the engine inside a script. Text or token ids in, completions or a stream of events out."""

from __future__ import annotations

import operator
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from types import TracebackType
from typing import Self

from splitrun.engine.assembly import assemble
from splitrun.engine.core import EngineCore
from splitrun.engine.detokenizer import TextStream
from splitrun.engine.loading import Load
from splitrun.engine.patience import Patience
from splitrun.engine.tokenizer import Tokenizer
from splitrun.errors import InvalidRequest, StageError
from splitrun.kernels.cpu.settings import check_settings
from splitrun.model.files import named_in, resolve
from splitrun.model.weights import release_free_memory
from splitrun.planner.placement import Placement
from splitrun.schedule.request import Request, SamplingParams, TokenEvent, TokenLogprob

Prompt = str | Sequence[int]
QUEUED = 512
"""Requests that `generate` keeps submitted ahead of the one it waits for; the engine's own queue is bounded."""


@dataclass(frozen=True)
class Completion:
    """One finished completion. ``logprobs`` has an entry per token where they were asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True)
class StreamEvent:
    """One step of a stream: the new token (None when only text was left over) and the text that it completed."""

    token_id: int | None
    text: str
    finish_reason: str | None = None


class Engine:
    """Loads what a placement says and runs it until closed. A context manager.

    ``placement`` is a Placement or the path of one. ``load`` "dummy" makes random weights. ``depth`` is the number of
    steps in flight (default: one per device), ``chunk_tokens`` the longest piece of a prompt per step (default, and
    at most: the placement's). ``patience`` says when a silent stage process (``process/cpu``,
    ``NODE/cpu``) is given up. ``rebalance``: a node that was lost is used again as soon as it is back. ``trace``:
    stages in other processes tell what they do when, for ``core.take_spans``.
    ``text`` False loads the tokenizer only when it is asked for.
    """

    def __init__(
        self,
        placement: Placement | str | os.PathLike[str],
        *,
        load: Load = "weights",
        depth: int | None = None,
        chunk_tokens: int | None = None,
        patience: Patience | None = None,
        rebalance: bool = False,
        trace: bool = False,
        text: bool = True,
    ) -> None:
        check_settings()
        file = None if isinstance(placement, Placement) else placement
        self.placement = placement if isinstance(placement, Placement) else Placement.load(placement)
        reference = self.placement.model
        with named_in("the placement" if file is None else os.fspath(file)):
            self.files = resolve(reference.source, reference.revision, weights=load == "weights")
        self._tokenizer = _Later(partial(Tokenizer.load, self.files.path))
        if text:
            self._tokenizer.result()  # before the KV: making it takes 120 MB for a moment
        planned = self.placement.workload.chunk_tokens
        chunk = min(chunk_tokens or planned, planned)  # the plan's blocks and workspace are for chunks of that size
        self.core: EngineCore = assemble(
            self.placement, self.files, load=load, depth=depth, chunk_tokens=chunk, patience=patience or Patience(),
            rebalance=rebalance, trace=trace,
        )  # fmt: skip
        self._ids = count(1)
        # In a thread of its own: a collection of garbage may come at any moment, in any thread, with any lock held.
        self._dropped = weakref.finalize(self, _close_aside, self.core)
        self._dropped.atexit = False

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        return self._tokenizer.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all requests and free the memory. An engine that is forgotten is closed too."""
        self._dropped.detach()
        self.core.close()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams | None = None) -> list[Completion]:
        """Complete the prompts together; ``sampling.n`` completions per prompt, in the prompts' order.

        Raises a RequestError before anything runs when one prompt cannot be served, StageError when a stage fails.
        """
        sampling = sampling or SamplingParams()
        if isinstance(prompts, str):
            raise InvalidRequest("generate takes a list of prompts, and this is one text: write it in brackets")
        if not isinstance(prompts, Iterable):
            raise InvalidRequest(f"generate takes a list of prompts, and this is of type {type(prompts).__name__}")
        jobs = [
            self._job(self._prompt_ids(prompt), sampling.completion(index))
            for prompt in prompts
            for index in range(sampling.n)
        ]
        with ExitStack() as cancelling:
            completions = []
            for index, job in enumerate(jobs):
                for later in jobs[index + QUEUED if index else 0 : index + QUEUED + 1]:
                    later.start(self.core)
                    cancelling.callback(self.core.cancel, later.request.request_id)
                completions.append(job.finish())
            return completions

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """The completion of one prompt, token by token. Leaving the loop early cancels the request.

        Raises a RequestError at once when the prompt cannot be served; ``sampling.n`` must be 1.
        """
        sampling = sampling or SamplingParams()
        if sampling.n != 1:
            raise InvalidRequest(f"n is {sampling.n}: a stream is of one completion; use generate for several")
        return self._streamed(self._job(self._prompt_ids(prompt), sampling))

    def _streamed(self, job: _Job) -> Iterator[StreamEvent]:
        job.start(self.core)
        try:
            yield from job.stream()
        finally:
            self.core.cancel(job.request.request_id)

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        try:
            return tuple(operator.index(token) for token in prompt)
        except TypeError:
            raise InvalidRequest("a prompt is a text or a list of token ids") from None

    def _job(self, ids: tuple[int, ...], sampling: SamplingParams) -> _Job:
        request = Request(next(self._ids), ids, sampling, tuple(self.tokenizer.eos_token_ids))
        self.core.check(request)  # before its ids are made text
        ends = frozenset(request.eos_token_ids + sampling.stop_token_ids)
        return _Job(request, TextStream(self.tokenizer, sampling.stop, ends, ids))


def _close_aside(core: EngineCore) -> None:
    threading.Thread(target=core.close, name="splitrun close", daemon=True).start()


class _Job:
    """One request on its way. Its text is made as its events arrive, so that a stop string ends it at once."""

    def __init__(self, request: Request, text: TextStream) -> None:
        self.request = request
        self._text = text
        self._pieces: queue.SimpleQueue[tuple[TokenEvent, str, str | None]] = queue.SimpleQueue()

    def start(self, core: EngineCore) -> None:
        """Submit the request."""

        def deliver(event: TokenEvent) -> None:
            told, text = replace(event, finish_reason="error", error="its text could not be made from its tokens"), ""
            try:
                text = self._text.push(event.token_ids, event.finish_reason)
                told = event
            finally:  # whoever waits is told of a fault here too
                self._pieces.put((told, text, "stop" if self._text.stopped else told.finish_reason))
            if self._text.stopped:
                core.cancel(event.request_id)

        core.submit(self.request, deliver)

    def stream(self) -> Iterator[StreamEvent]:
        """Events as text, until the request or its text ends."""
        for event, text, reason in self._received():
            for token_id in event.token_ids[:-1]:
                yield StreamEvent(token_id, "")
            yield StreamEvent(event.token_ids[-1] if event.token_ids else None, text, reason)

    def finish(self) -> Completion:
        """Wait for the end."""
        ids: list[int] = []
        pieces: list[str] = []
        logprobs: list[TokenLogprob] = []
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        reason = ""
        for event, text, ended in self._received():
            reason = ended or ""
            ids += event.token_ids
            logprobs += event.logprobs
            prompt_logprobs = event.prompt_logprobs or prompt_logprobs
            pieces.append(text)
        prompt_tokens = len(self.request.prompt)
        return Completion("".join(pieces), tuple(ids), reason, prompt_tokens, tuple(logprobs), prompt_logprobs)

    def _received(self) -> Iterator[tuple[TokenEvent, str, str | None]]:
        """Events with the text they completed and why it ended, None while it goes on."""
        reason: str | None = None
        while reason is None:
            event, text, reason = self._pieces.get()
            if event.finish_reason == "error":
                raise StageError(event.error or "the request failed in a stage")
            yield event, text, reason


class _Later:
    """The tokenizer, loaded when it is first asked for."""

    def __init__(self, load: Callable[[], Tokenizer]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._found: Tokenizer | None = None

    def result(self) -> Tokenizer:
        """The tokenizer; what making it took is given back."""
        with self._lock:
            if self._found is None:
                self._found = self._load()
                release_free_memory()
            return self._found
