"""What every endpoint needs: the engine's client, the tokenizer, the metrics and the name of the model."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from splitrun.engine.tokenizer import Tokenizer
from splitrun.serve.client import EngineClient
from splitrun.serve.errors import ModelNotFound
from splitrun.serve.metrics import Metrics
from splitrun.serve.schemas import Usage

P = ParamSpec("P")
T = TypeVar("T")
_LONG_TEXT = 4096
"""Characters from which a text is tokenized off the event loop; for short ones the hand-over costs more."""


@dataclass(frozen=True)
class ServeContext:
    """Shared by the endpoints of one HTTP process."""

    client: EngineClient
    tokenizer: Tokenizer
    metrics: Metrics
    served_name: str
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def most_tokens(self) -> int | None:
        """How many tokens of a text are worth making: beyond the context it is refused anyway."""
        return self.client.status.context or None

    def check_model(self, model: str | None) -> None:
        """Raises ModelNotFound when a request names another model; naming none is allowed."""
        if model is not None and model != self.served_name:
            raise ModelNotFound(f"the model {model[:200]!r} is not served here: ask for {self.served_name!r}")


def answer_id(prefix: str) -> str:
    """A name for one answer, such as chatcmpl-…"""
    return f"{prefix}-{secrets.token_hex(12)}"


def usage_of(prompt_tokens: int, completion_tokens: int) -> Usage:
    """Token counts as OpenAI reports them."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


async def in_thread_if_long(length: int, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """``work(*args)``, in a thread when a text of ``length`` characters would hold up the event loop."""
    if length < _LONG_TEXT:
        return work(*args, **options)
    return await asyncio.to_thread(work, *args, **options)


def json_logprob(value: float) -> float:
    """A log-probability as JSON can hold it: minus infinity as -9999, six decimals for tokens and candidates alike,
    so that clients may compare them for equality."""
    return round(value, 6) if value > -9999.0 else -9999.0
