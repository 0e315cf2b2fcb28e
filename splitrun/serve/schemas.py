"""Requests and answers of OpenAI's API as far as splitrun speaks it. Unknown fields of a request are ignored.

Answers are written with ``exclude_unset``: a field appears exactly when it was given, so that null and absent stay
different things. Knows nothing of the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from splitrun.schedule.request import MOST_TOKENS

T = TypeVar("T")
# Their first fault ends it: one for each entry of a body of 16 MB would take gigabytes.
ListOf = Annotated[list[T], Field(fail_fast=True)]
NonEmpty = Annotated[list[T], Field(min_length=1, fail_fast=True)]


def _bounded(value: Any) -> Any:
    """A mapping that is worth looking at."""
    if isinstance(value, dict) and len(value) > MOST_TOKENS:
        raise ValueError(f"{len(value)} entries are too many: at most {MOST_TOKENS}")
    return value


Flag = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]
"""Null is the default: clients send it for what their user has not set."""
Finish = Literal["stop", "length"]


class _Strict(BaseModel):
    """No quiet conversion: a number in quotes is refused."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(_Strict):
    """What a stream carries besides the text."""

    include_usage: Flag = False


class SamplingFields(_Strict):
    """What both kinds of completion can ask for. The last line is beyond OpenAI's own fields."""

    model: str | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | ListOf[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_bounded)] = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: Flag = False
    stop_token_ids: ListOf[int] | None = None
    return_token_ids: Flag = False

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ContentPart(_Strict):
    """One part of a message; only text is understood."""

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One message of a conversation. Further fields (tool calls, names) go to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | ListOf[ContentPart] | None = None


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: NonEmpty[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: ListOf[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(SamplingFields):
    """POST /v1/completions. A prompt is text or token ids; a list of either makes several completions."""

    prompt: str | NonEmpty[int] | NonEmpty[str] | NonEmpty[NonEmpty[int]]
    logprobs: int | None = None
    echo: Flag = False
    best_of: int | None = None
    suffix: str | None = None


class Usage(BaseModel):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatTopLogprob(BaseModel):
    """One candidate for a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    """The token that was chosen, and the likeliest ones."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatTokenLogprob]


class AnswerMessage(BaseModel):
    """The assistant's message, or the part of it that a chunk adds."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChoice(BaseModel):
    """One answer; ``message`` when it is whole, ``delta`` in a stream."""

    index: int
    message: AnswerMessage | None = None
    delta: AnswerMessage | None = None
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions, whole or one chunk of it."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities of /v1/completions: parallel lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion, or the part of it that a chunk adds."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    token_ids: list[int] | None = None


class Completion(BaseModel):
    """The answer of /v1/completions, whole or one chunk of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
