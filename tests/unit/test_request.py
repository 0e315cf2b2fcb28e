"""Sampling parameters: ranges are checked where they are made."""

from __future__ import annotations

from typing import Any

import pytest

from splitrun.errors import InvalidRequest
from splitrun.schedule.request import SamplingParams


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 101.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("stop_token_ids", tuple(range(1025))),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("n", 0),
        ("n", 129),
    ],
)
def test_out_of_range_names_the_parameter(name: str, wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match=name):
        SamplingParams(**{name: wrong})


def test_the_edges_of_the_ranges_are_inside() -> None:
    SamplingParams(max_tokens=1, temperature=0.0, top_k=0, top_p=1.0, min_p=1.0, seed=2**64 - 1, logprobs=20, n=128)
    SamplingParams(temperature=100.0, min_p=0.0, seed=-(2**63), logprobs=0, presence_penalty=-2.0)


def test_one_stop_string_and_lists_become_tuples() -> None:
    loose: dict[str, Any] = {"stop": "END", "stop_token_ids": [1, 2]}
    params = SamplingParams(**loose)
    assert (params.stop, params.stop_token_ids) == (("END",), (1, 2))
