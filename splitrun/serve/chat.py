"""POST /v1/chat/completions: a conversation through the model's chat template, answered whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from splitrun.engine.tokenizer import Tokenizer
from splitrun.errors import InvalidRequest
from splitrun.schedule.request import TokenLogprob
from splitrun.serve.context import ServeContext, answer_id, in_thread_if_long, json_logprob, usage_of
from splitrun.serve.generation import Generation, Piece, sampling_of
from splitrun.serve.responses import answer, stream
from splitrun.serve.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatTokenLogprob,
    ChatTopLogprob,
    Finish,
)

_RESERVED_OPTIONS = frozenset({
    "conversation", "tools", "tokenize", "chat_template", "return_tensors", "return_dict",
})  # fmt: skip
"""What a request must not tell the chat template, because it changes how it is called."""


def chat_router(context: ServeContext) -> APIRouter:
    """The route of chat completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        context.check_model(body.model)
        generation = await begin(context, body)
        if body.stream:
            return await stream(request, chunks(context, body, generation))
        return await answer(request, whole(context, body, generation))

    return router


async def begin(context: ServeContext, body: ChatRequest) -> Generation:
    """Check a request and turn it into a generation; raises InvalidRequest or ContextTooLong."""
    kind = (body.response_format or {}).get("type", "text")
    if kind != "text":
        raise InvalidRequest(f"response_format: {kind!r} is not supported: only 'text' is")
    if body.tool_choice not in (None, "none", "auto"):
        raise InvalidRequest("tool_choice: a call cannot be forced, 'auto' and 'none' are supported")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if body.max_completion_tokens is not None and body.max_completion_tokens < 1:
        raise InvalidRequest(f"max_completion_tokens is {body.max_completion_tokens}: it must be at least 1")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_of(body, context.tokenizer, max_tokens=limit, logprobs=logprobs)
    messages = [message_for_template(message) for message in body.messages]
    options = template_options(body.chat_template_kwargs)
    length = len(str(messages)) + len(str(body.tools or "")) + len(str(options))
    prompt = await in_thread_if_long(
        length, context.tokenizer.encode_chat, messages, body.tools, context.most_tokens, options
    )
    return Generation(context.client, context.tokenizer, context.metrics, [prompt], sampling)


def template_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """The options that a request passes to the chat template. Raises InvalidRequest for reserved ones."""
    taken = sorted(_RESERVED_OPTIONS & set(options or {}))
    if taken:
        raise InvalidRequest(f"chat_template_kwargs: {taken[0]} cannot be set by a request")
    return dict(options or {})


def message_for_template(message: ChatMessage) -> dict[str, Any]:
    """A message as templates expect it: text parts joined, absent fields left out. Raises InvalidRequest."""
    fields = message.model_dump(exclude_unset=True)
    if isinstance(message.content, list):
        for part in message.content:
            if part.type != "text" or part.text is None:
                raise InvalidRequest(f"a message holds a part of type {part.type[:40]!r}: this model reads text only")
        fields["content"] = "".join(part.text or "" for part in message.content)
    elif message.content is None:
        fields["content"] = ""
    return fields


async def whole(context: ServeContext, body: ChatRequest, generation: Generation) -> ChatCompletion:
    """The complete answer."""
    count = generation.choice_count
    texts: list[list[str]] = [[] for _ in range(count)]
    token_ids: list[list[int]] = [[] for _ in range(count)]
    logprobs: list[list[ChatTokenLogprob]] = [[] for _ in range(count)]
    finish: list[Finish | None] = [None] * count
    async for piece in generation.pieces():
        texts[piece.choice].append(piece.text)
        token_ids[piece.choice] += piece.token_ids
        logprobs[piece.choice] += chat_logprobs(context.tokenizer, piece.logprobs)
        finish[piece.choice] = piece.finish_reason or finish[piece.choice]
    choices = []
    for index in range(count):
        choice = ChatChoice(
            index=index,
            message=AnswerMessage(role="assistant", content="".join(texts[index])),
            logprobs=ChatLogprobs(content=logprobs[index]) if body.logprobs else None,
            finish_reason=finish[index],
        )
        if body.return_token_ids:
            choice.token_ids = token_ids[index]
        choices.append(choice)
    return ChatCompletion(
        id=answer_id("chatcmpl"), object="chat.completion", created=int(time.time()), model=context.served_name,
        choices=choices, usage=usage_of(generation.prompt_tokens, generation.completion_tokens),
    )  # fmt: skip


async def chunks(context: ServeContext, body: ChatRequest, generation: Generation) -> AsyncGenerator[ChatCompletion]:
    """The answer as chunks: the role with each choice's first text, the finish reason with its last."""
    name, created = answer_id("chatcmpl"), int(time.time())

    def chunk(choices: list[ChatChoice]) -> ChatCompletion:
        made = ChatCompletion(
            id=name, object="chat.completion.chunk", created=created, model=context.served_name, choices=choices
        )
        if body.include_usage:
            made.usage = None
        return made

    started: set[int] = set()
    pieces = generation.pieces()
    try:
        async for piece in pieces:
            if piece.choice not in started:
                started.add(piece.choice)
                delta = AnswerMessage(role="assistant", content="")
                yield chunk([ChatChoice(index=piece.choice, delta=delta, logprobs=None, finish_reason=None)])
            if piece.text or piece.logprobs or piece.finish_reason or body.return_token_ids:
                yield chunk([delta_choice(context.tokenizer, body, piece)])
    finally:
        await pieces.aclose()
    if body.include_usage:
        last = chunk([])
        last.usage = usage_of(generation.prompt_tokens, generation.completion_tokens)
        yield last


def delta_choice(tokenizer: Tokenizer, body: ChatRequest, piece: Piece) -> ChatChoice:
    """What one piece adds."""
    choice = ChatChoice(
        index=piece.choice,
        delta=AnswerMessage(content=piece.text) if piece.text else AnswerMessage(),
        logprobs=ChatLogprobs(content=chat_logprobs(tokenizer, piece.logprobs)) if body.logprobs else None,
        finish_reason=piece.finish_reason,
    )
    if body.return_token_ids:
        choice.token_ids = list(piece.token_ids)
    return choice


def chat_logprobs(tokenizer: Tokenizer, entries: tuple[TokenLogprob, ...]) -> list[ChatTokenLogprob]:
    """Log-probabilities in the chat format: text and bytes of each token and of its competitors."""

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": json_logprob(logprob), "bytes": list(data)}

    return [
        ChatTokenLogprob(
            **shown(entry.token_id, entry.logprob),
            top_logprobs=[ChatTopLogprob(**shown(*candidate)) for candidate in entry.top],
        )
        for entry in entries
    ]
