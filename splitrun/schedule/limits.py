"""What the placement allows, and the checks that refuse a request before it costs anything.

Knows the sizes of the plan and nothing of what is running.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitrun.errors import ContextTooLong, InvalidPlacement, InvalidRequest
from splitrun.schedule.blocks import GroupSpec, blocks_per_session
from splitrun.schedule.request import Request

CONTEXT_STEP = 1024
"""Suggested contexts are rounded up to a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The sizes a scheduler works within.

    context       most tokens of a sequence, prompt and output together
    sessions      most sequences at once; also the number of slots
    vocabulary    token ids are below this
    chunk_tokens  most prompt tokens in a step; prompts are cut at its multiples
    block_tokens  positions per KV block
    depth         most steps in flight
    streams       groups of decoding sequences, each a step of its own; None: as many as the depth
    max_waiting   most requests in the queue
    """

    context: int
    sessions: int
    vocabulary: int
    chunk_tokens: int = 512
    block_tokens: int = 64
    depth: int = 1
    streams: int | None = None
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        for name in ("context", "sessions", "vocabulary", "chunk_tokens", "block_tokens", "depth", "max_waiting"):
            value = getattr(self, name)
            if value < 1:
                raise InvalidPlacement(f"{name} is {value}: it must be at least 1")
        if self.streams is not None and self.streams < 1:
            raise InvalidPlacement(f"streams is {self.streams}: it must be at least 1")


def session_tokens(groups: tuple[GroupSpec, ...], limits: Limits) -> int:
    """The longest sequence, in tokens, whose KV fits when it runs alone; at most ``limits.context``."""
    tokens = limits.context
    for group in groups:
        need = blocks_per_session(group.window, limits.context, limits.chunk_tokens, limits.block_tokens)
        if need > group.blocks:
            tokens = min(tokens, group.blocks * limits.block_tokens)
    return tokens


def check_request(request: Request, limits: Limits, capacity: int) -> None:
    """Refuse what can never run. ``capacity``: the result of ``session_tokens``.

    Raises InvalidRequest for an empty prompt or token ids outside the vocabulary, ContextTooLong when no new token
    would fit behind the prompt.
    """
    if not request.prompt:
        raise InvalidRequest("the prompt has no tokens: send at least one")
    _check_ids("the prompt", min(request.prompt), max(request.prompt), limits.vocabulary)
    bias = request.sampling.logit_bias
    if bias:
        _check_ids("logit_bias", min(bias), max(bias), limits.vocabulary)
    length = len(request.prompt)
    if length < capacity:
        return
    holds = f"the placement holds {capacity}" + (" with a new one" if length == capacity else "")
    if capacity < limits.context:
        cure = f"the KV blocks of the plan are fewer than its context of {limits.context} needs: plan with more memory"
    else:
        wanted = length + (request.sampling.max_tokens or 1)
        cure = f"plan with --context {-(-wanted // CONTEXT_STEP) * CONTEXT_STEP}"
    raise ContextTooLong(f"the prompt has {length} tokens, {holds}: {cure}")


def _check_ids(what: str, lowest: int, highest: int, vocabulary: int) -> None:
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequest(f"{what} has token id {wrong}: ids must be 0 to {vocabulary - 1}")
