"""From one HTTP request to the engine and back: sampling parameters, fan-out, and text pieces per choice.

A request for n completions of p prompts becomes n·p engine requests; choice i·n + j is completion j of prompt i, with
seed + j. Knows nothing of JSON or of HTTP.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from splitrun.engine.detokenizer import TextStream
from splitrun.engine.interface import EngineStatus
from splitrun.engine.tokenizer import Tokenizer
from splitrun.errors import ContextTooLong, InvalidRequest, StageError
from splitrun.schedule.request import SamplingParams, TokenEvent, TokenLogprob
from splitrun.serve.client import EngineClient
from splitrun.serve.metrics import Metrics
from splitrun.serve.schemas import Finish, SamplingFields

_LOG = logging.getLogger(__name__)
MAX_CHOICES = 1024
MAX_STOP_CHARACTERS = 1024


@dataclass(frozen=True)
class Piece:
    """What one event adds to one choice.

    ``logprobs`` and ``starts`` (positions in the completion's text) belong to the tokens whose text is now shown.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    starts: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    finish_reason: Finish | None


class ChoiceText:
    """Turns the token events of one completion into pieces of text with their log-probabilities."""

    def __init__(
        self, choice: int, tokenizer: Tokenizer, sampling: SamplingParams, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._choice = choice
        ends = frozenset((*tokenizer.eos_token_ids, *sampling.stop_token_ids))
        self._stream = TextStream(tokenizer, sampling.stop, ends, prompt_ids)
        self._logprobs: list[TokenLogprob] = []
        self._shown = 0
        self.finished = False

    @property
    def completion_tokens(self) -> int:
        """Tokens taken so far, the end token included."""
        return len(self._stream.token_starts)

    def push(self, event: TokenEvent) -> Piece:
        """The piece that this event adds. ``finished`` may become true before the engine says so (stop strings)."""
        before = self.completion_tokens
        text = self._stream.push(event.token_ids, event.finish_reason)
        accepted = self.completion_tokens - before
        self._logprobs += event.logprobs[:accepted]
        finish: Finish | None = None
        if self._stream.stopped or event.finish_reason == "stop":
            finish = "stop"
        elif event.finish_reason == "length":
            finish = "length"
        self.finished = finish is not None
        first, last = self._shown, self._showable(whole=event.finish_reason is not None)
        self._shown = last
        return Piece(
            self._choice, text, event.token_ids[:accepted], tuple(self._logprobs[first:last]),
            tuple(self._stream.token_starts[first:last]), event.prompt_logprobs, finish,
        )  # fmt: skip

    def _showable(self, *, whole: bool) -> int:
        """How many log-probabilities may be shown: those of tokens whose text begins in what was shown."""
        if whole and not self._stream.stopped:
            return len(self._logprobs)
        count = self._shown
        while count < len(self._logprobs) and self._stream.token_starts[count] < self._stream.length:
            count += 1
        return count


class Generation:
    """One HTTP request at the engine."""

    def __init__(
        self, client: EngineClient, tokenizer: Tokenizer, metrics: Metrics, prompts: Sequence[Sequence[int]],
        sampling: SamplingParams, *, continues_prompt: bool = False,
    ) -> None:  # fmt: skip
        check_prompts(prompts, sampling, client.status)
        self.prompts = prompts
        self.completion_tokens = 0
        self._client = client
        self._tokenizer = tokenizer
        self._metrics = metrics
        samplings = fan_out(sampling)
        self._wishes = [(prompt, each) for prompt in prompts for each in samplings]
        self._choices = [
            ChoiceText(index, tokenizer, each, prompt if continues_prompt else ())
            for index, (prompt, each) in enumerate(self._wishes)
        ]

    @property
    def choice_count(self) -> int:
        """How many completions come."""
        return len(self._choices)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt) for prompt in self.prompts)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The pieces of all choices as they come. Raises the engine's refusal or failure; closing cancels the rest."""
        began = time.monotonic()
        last_seen = [0.0] * self.choice_count
        self._metrics.prompt_tokens.inc(self.prompt_tokens)
        async with self._client.submit_all(self._wishes, self._tokenizer.eos_token_ids) as events:
            index_of = {request_id: index for index, request_id in enumerate(events.request_ids)}
            told = {"requests": events.request_ids, "prompt_tokens": self.prompt_tokens}
            _LOG.info("request", extra={"fields": told})
            async for event in events:
                if event.finish_reason == "error":
                    raise StageError(event.error or "the engine failed on this request; look at the server's log")
                if event.finish_reason == "cancelled":
                    raise StageError("the server is shutting down and ended this request")
                index = index_of[event.request_id]
                choice = self._choices[index]
                before = choice.completion_tokens
                piece = choice.push(event)
                self.completion_tokens += choice.completion_tokens - before
                if event.token_ids:
                    now = time.monotonic()
                    self._metrics.observe_tokens(len(event.token_ids), now - (last_seen[index] or began),
                                                 first=not last_seen[index])  # fmt: skip
                    last_seen[index] = now
                if choice.finished and event.finish_reason is None:
                    await events.finish(event.request_id)
                yield piece


def fan_out(sampling: SamplingParams) -> list[SamplingParams]:
    """One sampling per completion, with the seeds seed, seed + 1, …; one draw when none is given."""
    drawn = dataclasses.replace(sampling, seed=secrets.randbits(62) if sampling.seed is None else sampling.seed)
    return [drawn.completion(index) for index in range(sampling.n)]


def check_prompts(prompts: Sequence[Sequence[int]], sampling: SamplingParams, status: EngineStatus) -> None:
    """Refuse what the engine would refuse, before anything is sent. Raises InvalidRequest or ContextTooLong."""
    if len(prompts) * sampling.n > MAX_CHOICES:
        raise InvalidRequest(f"{len(prompts)} prompts with n = {sampling.n}: at most {MAX_CHOICES} choices a request")
    for prompt in prompts:
        if not prompt:
            raise InvalidRequest("the prompt is empty: it must have at least one token")
        if min(prompt) < 0 or (status.vocabulary and max(prompt) >= status.vocabulary) or max(prompt) >= 2**31:
            raise InvalidRequest(f"a token id of the prompt is outside 0 to {(status.vocabulary or 2**31) - 1}")
        wanted = len(prompt) + (sampling.max_tokens or 1)
        if status.context and wanted > status.context:
            raise ContextTooLong(
                f"the prompt has {len(prompt)} tokens and max_tokens is {sampling.max_tokens or 1}, but the planned "
                f"context is {status.context} tokens: shorten them, or plan with a larger --context"
            )


def sampling_of(
    body: SamplingFields, tokenizer: Tokenizer, *, max_tokens: int | None, logprobs: int | None, echo: bool = False
) -> SamplingParams:
    """The sampling parameters of a request: its own fields, then the model's defaults, then OpenAI's."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    values = dict(tokenizer.sampling_defaults)
    values |= {name: value for name in names if (value := getattr(body, name)) is not None}
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError as error:
        raise InvalidRequest("logit_bias: its keys must be token ids") from error
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise InvalidRequest(f"stop: a string may have {MAX_STOP_CHARACTERS} characters at most")
    ids = [*bias, *(body.stop_token_ids or ())]
    limits = (max_tokens or 0, int(values.get("top_k", 0)), body.n or 0)
    if any(not 0 <= index < 2**31 for index in ids) or max(limits) >= 2**31:
        raise InvalidRequest("a token id, max_tokens, top_k or n is out of range: it must fit 31 bits")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=float(values.get("temperature", 1.0)),
        top_k=0 if values.get("top_k") == -1 else int(values.get("top_k", 0)),
        top_p=float(values.get("top_p", 1.0)),
        min_p=float(values.get("min_p", 0.0)),
        repetition_penalty=float(values.get("repetition_penalty", 1.0)),
        presence_penalty=float(values.get("presence_penalty", 0.0)),
        frequency_penalty=float(values.get("frequency_penalty", 0.0)),
        logit_bias=bias,
        seed=body.seed,
        stop=tuple(stops),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
        n=1 if body.n is None else body.n,
    )
