"""POST /v1/completions: prompts as text or token ids, continued; with echo and log-probabilities also scored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence

from fastapi import APIRouter, Request, Response

from splitrun.engine.tokenizer import Tokenizer
from splitrun.errors import InvalidRequest
from splitrun.schedule.request import TokenLogprob
from splitrun.serve.context import ServeContext, answer_id, in_thread_if_long, json_logprob, usage_of
from splitrun.serve.generation import Generation, Piece, sampling_of
from splitrun.serve.responses import answer, stream
from splitrun.serve.schemas import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Finish

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this endpoint."""


def completions_router(context: ServeContext) -> APIRouter:
    """The route of text completions."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=Completion)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        context.check_model(body.model)
        answerer = await CompletionAnswer.begin(context, body)
        if body.stream:
            return await stream(request, answerer.chunks())
        return await answer(request, answerer.whole())

    return router


async def prompts_of(context: ServeContext, prompt: str | list[int] | list[str] | list[list[int]]) -> list[list[int]]:
    """Token ids of every prompt in a request."""

    async def encode(text: str) -> list[int]:
        return await in_thread_if_long(len(text), context.tokenizer.encode, text, at_most=context.most_tokens)

    if isinstance(prompt, str):
        return [await encode(prompt)]
    prompts: list[list[int]] = []
    single: list[int] = []
    for entry in prompt:
        if isinstance(entry, str):
            prompts.append(await encode(entry))
        elif isinstance(entry, list):
            prompts.append(entry)
        else:
            single.append(entry)
    return [single] if single else prompts


class CompletionAnswer:
    """One request of /v1/completions on its way to an answer.

    With ``max_tokens: 0`` (scoring a prompt with echo) the engine still makes one token, which is not shown.
    """

    def __init__(self, context: ServeContext, body: CompletionRequest, generation: Generation) -> None:
        self._context = context
        self._body = body
        self._generation = generation
        self._hide_completion = body.max_tokens == 0
        self._name = answer_id("cmpl")
        self._created = int(time.time())
        count = generation.choice_count // len(generation.prompts)
        self._prompts = [prompt for prompt in generation.prompts for _ in range(count)]
        self._echo = [context.tokenizer.decode(prompt) if body.echo else "" for prompt in self._prompts]

    @classmethod
    async def begin(cls, context: ServeContext, body: CompletionRequest) -> CompletionAnswer:
        """Check a request and prepare it; raises InvalidRequest or ContextTooLong."""
        if body.suffix:
            raise InvalidRequest("suffix is not supported: this model continues a prompt and cannot fill a gap")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise InvalidRequest(f"best_of is {body.best_of}: choosing among more answers than n is not supported")
        limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if limit == 0 and not body.echo:
            raise InvalidRequest("max_tokens is 0: it must be at least 1 unless echo is true")
        sampling = sampling_of(body, context.tokenizer, max_tokens=limit or 1, logprobs=body.logprobs, echo=body.echo)
        prompts = await prompts_of(context, body.prompt)
        generation = Generation(
            context.client, context.tokenizer, context.metrics, prompts, sampling, continues_prompt=True
        )
        return cls(context, body, generation)

    async def whole(self) -> Completion:
        """The complete answer."""
        count = self._generation.choice_count
        texts = [[echo] for echo in self._echo]
        token_ids: list[list[int]] = [[] for _ in range(count)]
        logprobs = [CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]) for _ in texts]
        finish: list[Finish | None] = [None] * count
        async for piece in self._generation.pieces():
            self._add_logprobs(logprobs[piece.choice], piece)
            if not self._hide_completion:
                texts[piece.choice].append(piece.text)
                token_ids[piece.choice] += piece.token_ids
            finish[piece.choice] = piece.finish_reason or finish[piece.choice]
        return self._completion(
            [
                self._choice(index, "".join(texts[index]), logprobs[index], finish[index], token_ids[index])
                for index in range(count)
            ],
            with_usage=True,
        )

    async def chunks(self) -> AsyncGenerator[Completion]:
        """The answer as chunks; the echoed prompt comes with a choice's first."""
        started: set[int] = set()
        pieces = self._generation.pieces()
        try:
            async for piece in pieces:
                text = "" if self._hide_completion else piece.text
                if piece.choice not in started:
                    started.add(piece.choice)
                    text = self._echo[piece.choice] + text
                logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
                self._add_logprobs(logprobs, piece)
                if text or logprobs.tokens or piece.finish_reason or self._body.return_token_ids:
                    ids = [] if self._hide_completion else list(piece.token_ids)
                    yield self._completion([self._choice(piece.choice, text, logprobs, piece.finish_reason, ids)])
        finally:
            await pieces.aclose()
        if self._body.include_usage:
            yield self._completion([], with_usage=True)

    def _completion(self, choices: list[CompletionChoice], *, with_usage: bool = False) -> Completion:
        completion = Completion(
            id=self._name, object="text_completion", created=self._created, model=self._context.served_name,
            choices=choices,
        )  # fmt: skip
        if with_usage:
            made = 0 if self._hide_completion else self._generation.completion_tokens
            completion.usage = usage_of(self._generation.prompt_tokens, made)
        elif self._body.include_usage:
            completion.usage = None
        return completion

    def _choice(
        self, index: int, text: str, logprobs: CompletionLogprobs, finish: Finish | None, token_ids: list[int]
    ) -> CompletionChoice:
        shown = None if self._body.logprobs is None else logprobs
        choice = CompletionChoice(index=index, text=text, logprobs=shown, finish_reason=finish)
        if self._body.return_token_ids:
            choice.token_ids = token_ids
        return choice

    def _add_logprobs(self, lists: CompletionLogprobs, piece: Piece) -> None:
        """Append what a piece brings: first the prompt's, with echo, then those of its own tokens."""
        if self._body.logprobs is None:
            return
        tokenizer = self._context.tokenizer
        if self._body.echo and piece.prompt_logprobs is not None:
            offset = 0
            for token_id, entry in zip(self._prompts[piece.choice], piece.prompt_logprobs, strict=True):
                append_logprob(lists, tokenizer, token_id, entry, offset)
                offset += 0 if token_id in tokenizer.special_token_ids else len(tokenizer.token_text(token_id))
        if not self._hide_completion:
            start = len(self._echo[piece.choice])
            for position, entry in zip(piece.starts, piece.logprobs, strict=True):
                append_logprob(lists, tokenizer, entry.token_id, entry, start + position)


def append_logprob(
    lists: CompletionLogprobs, tokenizer: Tokenizer, token_id: int, entry: TokenLogprob | None, offset: int
) -> None:
    """Add one token. ``entry`` is None for a prompt's first, which nothing predicts."""
    lists.tokens.append(tokenizer.token_text(token_id))
    lists.text_offset.append(offset)
    lists.token_logprobs.append(None if entry is None else json_logprob(entry.logprob))
    lists.top_logprobs.append(None if entry is None else best_by_text(tokenizer, entry))


def best_by_text(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, float]:
    """Candidates by their text, the chosen token always among them. Of two with one text the likelier counts."""
    candidates: Sequence[tuple[int, float]] = (*entry.top, (entry.token_id, entry.logprob))
    best: dict[str, float] = {}
    for token_id, logprob in candidates:
        text = tokenizer.token_text(token_id)
        best[text] = max(json_logprob(logprob), best.get(text, -9999.0))
    return best
