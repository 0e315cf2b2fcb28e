"""The message that travels through the stages, and the one that comes back. Integers and arrays only.

A step holds one slice per row: ``count`` consecutive tokens of one sequence, which already has ``context`` tokens in
the KV cache. Prompt chunks have many tokens, decoding rows one. All arrays are int32, so that a captured graph can
read them in place. A stage sees nothing of requests but this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy
import numpy.typing

from splitrun.schedule.request import SamplingParams, TokenLogprob

IntArray = numpy.typing.NDArray[numpy.int32]


@dataclass(frozen=True)
class RowSampling:
    """What the head needs to choose one row's next token.

    ``position`` is the index of the token to be chosen in its sequence: randomness is a function of
    (``seed``, ``position``) alone. ``prompt_ids`` and ``output_ids`` are filled only when a penalty needs them.
    """

    params: SamplingParams
    seed: int
    position: int
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Step:
    """One pass through the pipeline.

    index           counts steps, never repeated
    token_ids       shape (tokens,): the rows' tokens, one row after the other
    query_starts    shape (rows + 1,): row r's tokens are token_ids[query_starts[r] : query_starts[r + 1]]
    context_lengths shape (rows,): tokens of the row's sequence that are in the KV cache before this step
    slots           shape (rows,): the sequence's slot, 0 <= slot < sessions; state groups are stored by slot
    block_tables    KV group name -> shape (rows, blocks): entry b is the id of the block that holds positions
                    [b * block_tokens, (b + 1) * block_tokens), -1 where there is none (not yet, or out of the window);
                    covers the slice's own positions. No entry for group "state".
    sampling        one entry per row; None for a row whose next token is not wanted (an inner prompt chunk)
    prompt_logprobs one entry per row: None, or how many alternatives to report with the log-probability of each
                    *following* prompt token (``prompt_targets``)
    prompt_targets  row -> the tokens that follow each position of the slice (the last chunk's ends one short)
    replay          one entry per row: the slice holds 2 to 16 generated tokens whose KV is recomputed; to repeat the
                    first computation bit by bit they go through the decode path, never as a prompt chunk
    requests        the rows' requests: nothing that is computed depends on them
    refill          stages that compute; empty: all. The others have the KV of these tokens already, and pass the step
                    on with what they sent behind them the first time
    """

    index: int
    epoch: int
    token_ids: IntArray
    query_starts: IntArray
    context_lengths: IntArray
    slots: IntArray
    block_tables: Mapping[str, IntArray]
    sampling: tuple[RowSampling | None, ...]
    prompt_logprobs: tuple[int | None, ...] = ()
    prompt_targets: Mapping[int, tuple[int, ...]] | None = None
    replay: tuple[bool, ...] = ()
    requests: tuple[int, ...] = ()
    refill: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Number of slices."""
        return len(self.context_lengths)

    @property
    def counts(self) -> IntArray:
        """Tokens per row. Shape: (rows,)."""
        return self.query_starts[1:] - self.query_starts[:-1]


@dataclass(frozen=True)
class RowTokens:
    """One row's outcome: accepted ids (none for an inner chunk), their log-probabilities where asked for."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """What leaves the head: one entry per row of the step with that index."""

    step: int
    epoch: int
    rows: tuple[RowTokens, ...]
