"""What a body of nonsense costs: its first fault, not one for each of a million entries."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from splitrun.serve.schemas import ChatRequest, CompletionRequest

MANY = 2000
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [0.5] * MANY},
        {"prompt": [[0.5] * MANY] * 3},
        {"prompt": "x", "stop": [5] * MANY},
        {"prompt": "x", "stop_token_ids": ["5"] * MANY},
        {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(MANY)), "y")},
        {"messages": [5] * MANY},
        {"messages": [{"role": "user", "content": [5] * MANY}]},
        {"messages": MESSAGES, "tools": [5] * MANY},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_list_is_left_at_its_first_fault(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        (ChatRequest if "messages" in fields else CompletionRequest).model_validate(fields)
    assert caught.value.error_count() <= 5


def test_lists_are_read_as_before() -> None:
    body = CompletionRequest.model_validate({"prompt": [[1, 2], [3]], "stop": ["a"], "logit_bias": {"5": 1}})
    assert (body.prompt, body.stop, body.logit_bias) == ([[1, 2], [3]], ["a"], {"5": 1.0})


def test_null_is_the_default_of_what_is_yes_or_no() -> None:
    fields = {"stream": None, "echo": None, "ignore_eos": None, "return_token_ids": None}
    read = CompletionRequest.model_validate({"prompt": "x", "stream_options": {"include_usage": None}, **fields})
    assert not any((read.stream, read.echo, read.ignore_eos, read.return_token_ids, read.include_usage))
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"prompt": "x", "stream": "no"})
