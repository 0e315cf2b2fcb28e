"""One request while it runs: its tokens, how far they have been scheduled, and what comes next.

Two lengths describe it: ``known`` tokens (prompt and accepted output) and ``scheduled`` tokens (those whose KV some
step has computed or is computing). It is ready when ``scheduled < known``: prompt chunks do not wait for each other's
results, a decoded token waits for the one before. Knows nothing of blocks or other sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from splitrun.schedule.blocks import REPLAY_TOKENS, SCORED_CHUNK_TOKENS
from splitrun.schedule.request import FinishReason, Request, TokenLogprob
from splitrun.schedule.step import RowSampling


class State(Enum):
    """Where a sequence is: in the queue, on a slot, or done."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True)
class Slice:
    """Consecutive tokens of one sequence that go into one step.

    prompt  a chunk of the prompt
    replay  generated tokens whose KV was given up and is recomputed, more than one at a time
    decode  the newest token
    """

    start: int
    count: int
    kind: Literal["prompt", "replay", "decode"]

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.count


@dataclass(eq=False)
class Sequence:
    """A request and its progress. ``arrival`` orders sequences: lower came first and has priority.

    ``token_limit`` is the length at which it ends. ``in_flight`` counts the steps under way that hold a slice of it;
    ``confirmed`` tokens have come through all stages. Up to ``refill_end`` only some stages compute: the others have
    been there before.
    ``prompt_logprobs`` collects entries chunk by chunk (None when not asked for) until the first token delivers them.
    """

    request: Request
    arrival: int
    seed: int
    token_limit: int
    output: list[int] = field(default_factory=list)
    scheduled: int = 0
    confirmed: int = 0
    refill_end: int = 0
    slot: int | None = None
    state: State = State.WAITING
    in_flight: int = 0
    last_step: int = -1
    preemptions: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None

    def __post_init__(self) -> None:
        if self.request.sampling.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def known(self) -> int:
        """Tokens whose ids are known: prompt and output."""
        return len(self.request.prompt) + len(self.output)

    @property
    def ready(self) -> bool:
        """Whether a next slice exists already."""
        return self.scheduled < self.known

    @property
    def refilling(self) -> bool:
        """Whether the next slice is for some stages alone."""
        return self.scheduled < self.refill_end

    @property
    def decoding(self) -> bool:
        """Whether all but the newest token is scheduled: it has, or waits for, a decode row."""
        return self.scheduled >= self.prompt_length and self.known - self.scheduled <= 1

    def next_slice(self, chunk_tokens: int) -> Slice:
        """What to compute next; the sequence must be ready.

        Prompts are cut at multiples of ``chunk_tokens`` from their start (of SCORED_CHUNK_TOKENS when they are
        scored) and replayed output at multiples of REPLAY_TOKENS from the prompt's end, whatever else runs, so that a
        second computation repeats the first.
        """
        start = self.scheduled
        if start < self.prompt_length:
            return Slice(start, min(self._prompt_chunk(chunk_tokens), self.prompt_length - start), "prompt")
        count = min(REPLAY_TOKENS, chunk_tokens, (self.refill_end if self.refilling else self.known) - start)
        return Slice(start, count, "replay" if count > 1 else "decode")

    def _prompt_chunk(self, chunk_tokens: int) -> int:
        scored = self.request.sampling.prompt_logprobs is not None
        return min(chunk_tokens, SCORED_CHUNK_TOKENS) if scored else chunk_tokens

    def slice_start(self, position: int, chunk_tokens: int) -> int:
        """The last position up to this one where a slice may start: in the prompt, where one started before."""
        return position if position >= self.prompt_length else position - position % self._prompt_chunk(chunk_tokens)

    def tokens(self, slice_: Slice) -> list[int]:
        """The ids of a slice. Slices never cross the border between prompt and output."""
        if slice_.kind == "prompt":
            return list(self.request.prompt[slice_.start : slice_.end])
        offset = self.prompt_length
        return self.output[slice_.start - offset : slice_.end - offset]

    def sampling(self, slice_: Slice) -> RowSampling | None:
        """What the head needs to choose the token after the slice; None when that token is known already."""
        if slice_.end < self.known:
            return None
        params = self.request.sampling
        return RowSampling(
            params=params,
            seed=self.seed,
            position=slice_.end,
            prompt_ids=self.request.prompt if params.repetition_penalty != 1.0 else (),
            output_ids=tuple(self.output) if params.penalizes else (),
        )

    def prompt_targets(self, slice_: Slice) -> tuple[int, ...] | None:
        """The prompt tokens after each position of the slice; None where their log-probabilities are not wanted.

        A chunk that is computed again after preemption has been collected already.
        """
        if slice_.kind != "prompt" or self.prompt_logprobs is None or len(self.prompt_logprobs) > slice_.start + 1:
            return None
        return self.request.prompt[slice_.start + 1 : slice_.end + 1] or None

    def accept(self, token: int) -> FinishReason | None:
        """Append a token; says why the sequence ends with it, or None."""
        self.output.append(token)
        params = self.request.sampling
        if token in params.stop_token_ids or (token in self.request.eos_token_ids and not params.ignore_eos):
            return "stop"
        return "length" if self.known >= self.token_limit else None

    def restart(self) -> None:
        """Give up all computed KV: everything known is to be computed again, on another slot."""
        self.go_back(0)
        self.refill_end = 0
        self.slot = None
        self.state = State.WAITING

    def go_back(self, position: int) -> None:
        """Compute everything from this position again, on the same slot and blocks."""
        self.scheduled = self.confirmed = position
        self.in_flight = 0
