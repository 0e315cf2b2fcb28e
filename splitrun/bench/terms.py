"""The terms of a contest and its results: plain data that travels between processes as JSON. Knows no contestant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from random import Random
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Terms:
    """What every contestant does: a prompt of ``prompt_tokens`` random ids, then ``new_tokens`` greedy ones.

    ``placement_file`` holds splitrun's plan; ``model`` is the model's directory, ``budgets`` bytes per device. ``load``
    "dummy" runs on random weights. The first of ``repeat`` + 1 rounds warms up and is not counted.
    """

    contestant: str
    model: str
    placement_file: str
    prompt_tokens: int
    new_tokens: int
    repeat: int = 3
    load: str = "weights"
    budgets: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int = 0

    def to_json(self) -> dict[str, Any]:
        """Nested dictionaries, lists, numbers and strings only."""
        return asdict(self)

    def prompt(self, round_: int) -> list[int]:
        """The prompt of a round: fresh ids each time, so that no cache of prompts helps, the same for everyone."""
        random = Random(round_)
        return [random.randrange(self.vocabulary) for _ in range(self.prompt_tokens)]


@dataclass(frozen=True)
class Round:
    """Moments of one round in seconds after it was asked for: the first and the last token; how many came."""

    first_s: float
    last_s: float
    tokens: int


@dataclass(frozen=True)
class Result:
    """What one contestant did; rates and times are medians over the rounds.

    peak_bytes  device -> most memory held: main memory above the process's start (anonymous and file pages), a card's
                with its context
    error       why there is no figure, None when there is
    """

    contestant: str
    prompt_tokens: int
    new_tokens: int
    load_s: float = 0.0
    ttft_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    devices: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Figures rounded to what they can mean."""
        values = asdict(self)
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


def summarise(
    terms: Terms, load_s: float, rounds: list[Round], peak_bytes: Mapping[str, int], devices: Mapping[str, str]
) -> Result:
    """One result from counted rounds: medians, so that one disturbed round does not decide."""
    first = median(round_.first_s for round_ in rounds)
    decoded = [
        (round_.tokens - 1) / max(round_.last_s - round_.first_s, 1e-9) for round_ in rounds if round_.tokens > 1
    ]
    return Result(
        contestant=terms.contestant,
        prompt_tokens=terms.prompt_tokens,
        new_tokens=min(round_.tokens for round_ in rounds),
        load_s=load_s,
        ttft_s=first,
        prefill_tokens_per_s=terms.prompt_tokens / max(first, 1e-9),
        decode_tokens_per_s=median(decoded) if decoded else 0.0,
        peak_bytes=dict(peak_bytes),
        devices=dict(devices),
    )


def ratios(own: Result, other: Result) -> dict[str, float]:
    """How many times better ``own`` is: above 1 splitrun is faster, or takes less memory. Empty without figures."""
    if own.error or other.error:
        return {}
    found = {
        "decode": own.decode_tokens_per_s / max(other.decode_tokens_per_s, 1e-9),
        "prefill": own.prefill_tokens_per_s / max(other.prefill_tokens_per_s, 1e-9),
        "first_token": other.ttft_s / max(own.ttft_s, 1e-9),
        "load": other.load_s / max(own.load_s, 1e-9),
        "memory": sum(other.peak_bytes.values()) / max(sum(own.peak_bytes.values()), 1),
    }
    return {name: round(value, 3) for name, value in found.items()}
