"""One sequence: how it is cut into slices, what the head is told, when it ends."""

from __future__ import annotations

from typing import Any

import pytest

from splitrun.schedule.request import Request, SamplingParams
from splitrun.schedule.sequence import Sequence, Slice


def make(prompt: int, output: int = 0, **sampling: Any) -> Sequence:
    params = SamplingParams(**sampling)
    request = Request(1, tuple(range(100, 100 + prompt)), params, eos_token_ids=(2,))
    return Sequence(request, arrival=0, seed=9, token_limit=1000, output=list(range(200, 200 + output)))


@pytest.mark.parametrize(
    ("prompt", "output", "chunk", "expected"),
    [
        (1, 0, 8, [(0, 1, "prompt")]),
        (8, 0, 8, [(0, 8, "prompt")]),
        (19, 0, 8, [(0, 8, "prompt"), (8, 8, "prompt"), (16, 3, "prompt")]),
        (9, 1, 8, [(0, 8, "prompt"), (8, 1, "prompt"), (9, 1, "decode")]),
        (5, 2, 512, [(0, 5, "prompt"), (5, 2, "replay")]),
        (5, 33, 512, [(0, 5, "prompt"), (5, 16, "replay"), (21, 16, "replay"), (37, 1, "decode")]),
        (3, 5, 2, [(0, 2, "prompt"), (2, 1, "prompt"), (3, 2, "replay"), (5, 2, "replay"), (7, 1, "decode")]),
    ],
)
def test_slices(prompt: int, output: int, chunk: int, expected: list[tuple[int, int, Any]]) -> None:
    sequence, slices, tokens = make(prompt, output), [], []
    while sequence.ready:
        slice_ = sequence.next_slice(chunk)
        slices.append(slice_)
        tokens += sequence.tokens(slice_)
        wanted = sequence.sampling(slice_)
        assert (wanted is not None) == (slice_.end == sequence.known)
        assert wanted is None or wanted.position == sequence.known
        sequence.scheduled = slice_.end
    assert slices == [Slice(start, count, kind) for start, count, kind in expected]
    assert tokens == [*sequence.request.prompt, *sequence.output]
    assert sequence.decoding


@pytest.mark.parametrize(
    ("sampling", "prompt_ids", "output_ids"),
    [
        ({}, (), ()),
        ({"temperature": 0.0, "top_k": 3}, (), ()),
        ({"repetition_penalty": 1.1}, (100, 101), (200,)),
        ({"presence_penalty": 0.5}, (), (200,)),
        ({"frequency_penalty": -0.5}, (), (200,)),
    ],
)
def test_history_travels_only_with_penalties(
    sampling: dict[str, float], prompt_ids: tuple[int, ...], output_ids: tuple[int, ...]
) -> None:
    sequence = make(2, 1, **sampling)
    row = sequence.sampling(Slice(2, 1, "decode"))
    assert row is not None
    assert (row.seed, row.prompt_ids, row.output_ids) == (9, prompt_ids, output_ids)


@pytest.mark.parametrize(
    ("collected", "slice_", "expected"),
    [
        (1, Slice(0, 2, "prompt"), (101, 102)),
        (1, Slice(2, 2, "prompt"), (103, 104)),  # the first chunk is still in flight
        (1, Slice(4, 1, "prompt"), None),  # nothing follows the last token
        (3, Slice(0, 2, "prompt"), None),  # computed again, collected before
        (3, Slice(2, 2, "prompt"), (103, 104)),
        (5, Slice(5, 1, "decode"), None),
    ],
)
def test_prompt_targets(collected: int, slice_: Slice, expected: tuple[int, ...] | None) -> None:
    sequence = make(5, prompt_logprobs=0)
    sequence.prompt_logprobs = [None] * collected
    assert sequence.prompt_targets(slice_) == expected
    assert make(5).prompt_targets(slice_) is None


@pytest.mark.parametrize(
    ("token", "limit", "sampling", "reason"),
    [
        (3, 1000, {}, None),
        (2, 1000, {}, "stop"),
        (2, 1000, {"ignore_eos": True}, None),
        (2, 1000, {"ignore_eos": True, "stop_token_ids": (2,)}, "stop"),
        (4, 1000, {"stop_token_ids": (4,)}, "stop"),
        (3, 6, {}, "length"),
        (2, 6, {}, "stop"),  # an end that is both is the model's own
    ],
)
def test_when_it_ends(token: int, limit: int, sampling: dict[str, Any], reason: str | None) -> None:
    sequence = make(5, **sampling)
    sequence.token_limit = limit
    assert sequence.accept(token) == reason
    assert sequence.output == [token]
