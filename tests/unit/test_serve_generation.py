"""Fan-out, limits, defaults, and how text and log-probabilities of one choice keep together."""

from __future__ import annotations

import pytest
from tiny_tokenizers import write_model_directory

from splitrun.engine.interface import EngineStatus
from splitrun.engine.tokenizer import Tokenizer
from splitrun.errors import ContextTooLong, InvalidRequest
from splitrun.schedule.request import SamplingParams, TokenEvent, TokenLogprob
from splitrun.serve.context import json_logprob
from splitrun.serve.generation import ChoiceText, Piece, check_prompts, fan_out, sampling_of
from splitrun.serve.schemas import ChatRequest

STATUS = EngineStatus(True, context=100, vocabulary=400)
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_model_directory(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [
        (7, [7, 8, 9]),
        (-2, [-2, 2**64 - 1, 0]),
        (2**63 - 1, [2**63 - 1, 2**63, 2**63 + 1]),
        (2**64 - 1, [2**64 - 1, 0, 1]),
    ],
)
def test_completions_take_consecutive_seeds(seed: int, seeds: list[int]) -> None:
    made = fan_out(SamplingParams(n=3, seed=seed))
    assert [each.seed for each in made] == seeds
    assert {each.n for each in made} == {1}


def test_without_a_seed_one_is_drawn_for_each_request() -> None:
    first, second = fan_out(SamplingParams(n=2)), fan_out(SamplingParams(n=2))
    assert len({each.seed for each in first + second}) == 4


@pytest.mark.parametrize(
    ("prompts", "sampling", "error", "words"),
    [
        ([[]], SamplingParams(), InvalidRequest, "empty"),
        ([[1], [400]], SamplingParams(), InvalidRequest, "0 to 399"),
        ([[-1]], SamplingParams(), InvalidRequest, "outside"),
        ([[1] * 91], SamplingParams(max_tokens=10), ContextTooLong, "91 tokens and max_tokens is 10"),
        ([[1] * 100], SamplingParams(), ContextTooLong, "100"),
        ([[1]] * 513, SamplingParams(n=2), InvalidRequest, "at most 1024"),
    ],
)
def test_what_cannot_run_is_refused_at_once(
    prompts: list[list[int]], sampling: SamplingParams, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        check_prompts(prompts, sampling, STATUS)


def test_what_just_fits_is_accepted() -> None:
    check_prompts([[1] * 90, [399]], SamplingParams(max_tokens=10), STATUS)


def test_a_requests_own_values_go_before_the_models(tokenizer: Tokenizer) -> None:
    body = ChatRequest.model_validate({"messages": MESSAGES, "top_k": 3, "logit_bias": {"5": -1}, "stop": "x"})
    sampling = sampling_of(body, tokenizer, max_tokens=4, logprobs=None)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 3, 1.0)
    assert (sampling.logit_bias, sampling.stop, sampling.max_tokens) == ({5: -1}, ("x",), 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"five": 1}}, {"logit_bias": {"5": 200}}, {"logit_bias": {"-5": 1}}, {"temperature": -1},
        {"temperature": float("nan")}, {"top_p": 0}, {"n": 0}, {"stop": ["x"] * 17}, {"stop": "x" * 2000},
        {"stop": ""}, {"stop_token_ids": [2**40]}, {"top_k": 2**40}, {"seed": 2**70},
    ],
    ids=lambda fields: str(fields)[:40],
)  # fmt: skip
def test_values_out_of_range_are_invalid_requests(tokenizer: Tokenizer, fields: dict[str, object]) -> None:
    body = ChatRequest.model_validate({"messages": MESSAGES, **fields})
    with pytest.raises(InvalidRequest):
        sampling_of(body, tokenizer, max_tokens=None, logprobs=None)


def pieces(tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = (), finish: str = "length") -> list[Piece]:
    """The pieces of a text whose tokens come one by one, each with its log-probability."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    choice = ChoiceText(0, tokenizer, SamplingParams(stop=stop, logprobs=0))
    made = []
    for index, token in enumerate(ids):
        last = finish if index == len(ids) - 1 else None
        made.append(choice.push(TokenEvent(1, (token,), (TokenLogprob(token, -float(index)),), None, last)))
        if choice.finished:
            break
    return made


def test_log_probabilities_come_with_their_text(tokenizer: Tokenizer) -> None:
    made = pieces(tokenizer, "a 龘 b")
    shown = "".join(piece.text for piece in made)
    assert shown == "a 龘 b"
    length = 0
    for piece in made[:-1]:
        length += len(piece.text)
        assert all(start < length for start in piece.starts)
    entries = [entry for piece in made for entry in piece.logprobs]
    assert [entry.token_id for entry in entries] == tokenizer.encode("a 龘 b", add_special_tokens=False)


def test_tokens_of_a_cut_stop_string_show_no_log_probability(tokenizer: Tokenizer) -> None:
    made = pieces(tokenizer, "abXYZcd", stop=("XYZ",))
    assert "".join(piece.text for piece in made) == "ab"
    text = "".join(tokenizer.token_text(entry.token_id) for piece in made for entry in piece.logprobs)
    assert text == "ab"
    assert made[-1].finish_reason == "stop"
    assert all(piece.finish_reason is None for piece in made[:-1])


def test_the_end_token_keeps_its_log_probability_and_hides_its_text(tokenizer: Tokenizer) -> None:
    made = pieces(tokenizer, "ab<|im_end|>", finish="stop")
    assert "".join(piece.text for piece in made) == "ab"
    assert [entry.token_id for piece in made for entry in piece.logprobs][-1] == 4


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.12345678, -0.123457), (float("-inf"), -9999.0), (-1e9, -9999.0), (0.0, 0.0)]
)
def test_log_probabilities_fit_json(value: float, shown: float) -> None:
    assert json_logprob(value) == shown
