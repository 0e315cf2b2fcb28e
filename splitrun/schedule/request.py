"""A request as the engine sees it: token ids in, token events out. Knows no text, no tensors, no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from splitrun.errors import InvalidRequest

FinishReason = Literal["stop", "length", "cancelled", "error"]
MOST_TOKENS = 1024
"""Of a logit_bias, and of stop_token_ids: every step looks through them."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    temperature 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch those filters off. Penalties look at
    prompt and output (repetition) or output only (presence, frequency). ``seed`` makes a request repeatable whatever
    else runs in the batch; None draws one. ``stop`` strings are cut from the text; ``stop_token_ids`` end generation
    like the model's own end-of-sequence ids, which ``ignore_eos`` switches off. ``logprobs`` asks for the
    log-probability of each new token and that many alternatives (0: the token alone), ``prompt_logprobs`` the same
    for the prompt. ``n`` is the number of completions per prompt.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1

    @property
    def penalizes(self) -> bool:
        """Whether the next token depends on how often others came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "between 0 and 100")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "between 0 and 1")
        _require(0.01 <= self.repetition_penalty <= 100.0, "repetition_penalty", self.repetition_penalty,
                 "between 0.01 and 100")  # fmt: skip
        _require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", self.presence_penalty, "between -2 and 2")
        _require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", self.frequency_penalty, "between -2 and 2")
        for name in ("logit_bias", "stop_token_ids"):
            count = len(getattr(self, name))
            _require(count <= MOST_TOKENS, name, f"of {count} tokens", f"of at most {MOST_TOKENS}")
        for token, bias in self.logit_bias.items():
            _require(-100.0 <= bias <= 100.0, f"logit_bias of {token}", bias, "between -100 and 100")
        _require(all(token >= 0 for token in self.logit_bias), "logit_bias", "a token id", "0 or more")
        _require(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", self.seed, "a 64-bit integer")
        _require(all(self.stop), "stop", "''", "non-empty strings")
        _require(len(self.stop) <= 16, "stop", f"{len(self.stop)} strings", "at most 16")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 20, name, value, "between 0 and 20")
        _require(1 <= self.n <= 128, "n", self.n, "between 1 and 128")

    def completion(self, index: int) -> SamplingParams:
        """Of completion ``index`` of the ``n``: the same for one completion, with a seed of its own: seed + index."""
        seed = self.seed
        if seed is not None and index:
            seed = (seed + index) % 2**64
        return replace(self, n=1, seed=seed)


def _require(holds: bool, name: str, value: object, range_: str) -> None:
    if not holds:
        raise InvalidRequest(f"{name} is {value}: it must be {range_}")


@dataclass(frozen=True)
class Request:
    """One completion to make. ``eos_token_ids`` are the model's; ``sampling.n`` is 1 here: callers fan out."""

    request_id: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token and of the most likely ones, best first, taken before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """What the engine reports per request and step.

    ``token_ids`` are newly accepted; it is empty in an event that only ends a request. ``prompt_logprobs`` arrives
    once, with the first token: one entry per prompt token, None for the first, which nothing predicts.
    ``finish_reason`` is None while the request runs; ``error`` holds the message when it is "error".
    """

    request_id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
