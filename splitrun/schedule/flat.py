"""Sampling parameters and log-probabilities as plain JSON values and flat lists of numbers, for messages.

What comes back is checked value by value: a message of another process is data, never trusted. Knows no sockets and no
message formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from splitrun.errors import SplitrunError
from splitrun.schedule.request import SamplingParams, TokenLogprob

_REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_WHOLES = ("max_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "n")
_SAMPLING_FIELDS = {entry.name for entry in fields(SamplingParams)}
_DEFAULTS = asdict(SamplingParams())


class MalformedMessage(SplitrunError):
    """Bytes that are no message of this version. Never reaches a user: the receiver drops them."""


def sampling_fields(params: SamplingParams) -> dict[str, Any]:
    """Sampling parameters as a JSON object of those that are not at their defaults."""
    values = {name: value for name, default in _DEFAULTS.items() if (value := getattr(params, name)) != default}
    if "logit_bias" in values:
        values["logit_bias"] = list(params.logit_bias.items())
    return values


def sampling_of(control: Mapping[str, Any]) -> SamplingParams:
    """The inverse of ``sampling_fields``; raises MalformedMessage, or InvalidRequest for values out of range."""
    values = dict(control)
    if not set(values) <= _SAMPLING_FIELDS:
        raise MalformedMessage("unknown sampling parameters")
    try:
        values["logit_bias"] = {whole(token): float(bias) for token, bias in values.pop("logit_bias", ())}
        values["stop"] = tuple(str(stop) for stop in values.pop("stop", ()))
        values["stop_token_ids"] = tuple(whole(token) for token in values.pop("stop_token_ids", ()))
        values["ignore_eos"] = bool(values.pop("ignore_eos", False))
        for name in values.keys() & set(_REALS):
            values[name] = float(values[name])
        for name in _WHOLES:
            if values.get(name) is not None:
                values[name] = whole(values[name])
        return SamplingParams(**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise MalformedMessage(f"a sampling parameter is of the wrong type: {error}") from error


def whole(value: object) -> int:
    """The value, if it is an integer; raises TypeError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def append_logprobs(entries: Sequence[TokenLogprob | None], integers: list[int], reals: list[float]) -> None:
    """Write a list of log-probabilities: count, then per entry the number of alternatives (-1: no entry), ids."""
    integers.append(len(entries))
    for entry in entries:
        if entry is None:
            integers.append(-1)
            continue
        integers += [len(entry.top), entry.token_id, *[token for token, _ in entry.top]]
        reals += [entry.logprob, *[logprob for _, logprob in entry.top]]


def read_logprobs(integers: Iterator[int], reals: Iterator[float]) -> Iterator[TokenLogprob | None]:
    """The inverse of ``append_logprobs``. A generator that runs dry ends in RuntimeError (PEP 479)."""
    for _ in range(size(next(integers))):
        alternatives = next(integers)
        if alternatives == -1:
            yield None
            continue
        token_id = next(integers)
        tokens = [next(integers) for _ in range(size(alternatives))]
        logprob = next(reals)
        if math.isnan(logprob):
            raise MalformedMessage("a log-probability is not a number")
        yield TokenLogprob(token_id, logprob, tuple([(token, next(reals)) for token in tokens]))


def size(value: int) -> int:
    """A count, which cannot be negative; raises MalformedMessage."""
    if value < 0:
        raise MalformedMessage("a count is negative")
    return value
