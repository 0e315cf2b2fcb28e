"""Sampling against plain Python, against transformers' own processors, and against statistics."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as processors

from splitrun.schedule.request import SamplingParams
from splitrun.schedule.step import RowSampling, RowTokens
from splitrun.stage import draw as draw_module
from splitrun.stage import sampling as sampling_module
from splitrun.stage.sampling import prompt_logprobs, sample
from splitrun.stage.uniform import splitmix64, uniform

VOCABULARY = 60


def row(
    position: int = 3, seed: int = 1, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **params: Any
) -> RowSampling:
    return RowSampling(SamplingParams(**params), seed, position, prompt, output)


def make_logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator) * spread


def tokens(logits: torch.Tensor, rows: list[RowSampling]) -> list[int]:
    return [token for outcome in sample(logits, rows) for token in outcome.token_ids]


# ---- a slow reference, one row at a time, in exact order of the definition ----


def adjusted(logits: list[float], wanted: RowSampling) -> list[float]:
    params, result = wanted.params, list(logits)
    for token, bias in params.logit_bias.items():
        result[token] += bias
    for token in {*wanted.prompt_ids, *wanted.output_ids}:
        penalty = params.repetition_penalty
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    for token, count in Counter(wanted.output_ids).items():
        result[token] -= params.presence_penalty + params.frequency_penalty * count
    return result


def distribution(logits: list[float], params: SamplingParams) -> list[float]:
    """Probabilities after temperature and filters."""
    top = max(logits)
    weights = [math.exp((logit - top) / params.temperature) for logit in logits]
    if params.top_k:
        kth = sorted(logits, reverse=True)[min(params.top_k, len(logits)) - 1]
        weights = [weight if logit >= kth else 0.0 for weight, logit in zip(weights, logits, strict=True)]
    total = sum(weights)
    if params.top_p < 1:
        above = [sum(other for other in weights if other > weight) for weight in weights]
        weights = [weight if mass < params.top_p * total else 0.0 for weight, mass in zip(weights, above, strict=True)]
    weights = [weight if weight >= params.min_p else 0.0 for weight in weights]
    return [weight / sum(weights) for weight in weights]


def reference(logits: list[float], wanted: RowSampling) -> int:
    scores = adjusted(logits, wanted)
    if wanted.params.temperature == 0:
        return scores.index(max(scores))
    threshold, mass = uniform(wanted.seed, wanted.position), 0.0
    probabilities = distribution(scores, wanted.params)
    for token, probability in enumerate(probabilities):
        mass += probability
        if threshold < mass:
            return token
    raise AssertionError("the probabilities do not sum to 1")


def random_row(randomness: random.Random) -> RowSampling:
    history = [randomness.randrange(VOCABULARY) for _ in range(40)]
    params: dict[str, Any] = {"temperature": randomness.choice([0.0, 0.3, 1.0, 1.7])}
    for name, values in {
        "top_k": [1, 2, 7, VOCABULARY, 10 * VOCABULARY],
        "top_p": [1e-9, 0.3, 0.9, 0.999],
        "min_p": [0.01, 0.2, 1.0],
        "repetition_penalty": [0.7, 1.3],
        "presence_penalty": [-1.0, 1.5],
        "frequency_penalty": [-0.4, 0.4],
        "logit_bias": [{3: 5.0, 17: -100.0}, {0: 100.0}],
        "logprobs": [0, 3],
    }.items():
        if randomness.random() < 0.4:
            params[name] = randomness.choice(values)
    return row(
        position=randomness.randrange(1000),
        seed=randomness.getrandbits(64) - 2**63,
        prompt=tuple(history[:20]),
        output=tuple(history[20:]),
        **params,
    )


@pytest.mark.parametrize("seed", range(12))
def test_every_combination_equals_the_slow_reference(seed: int) -> None:
    randomness = random.Random(seed)
    rows = [random_row(randomness) for _ in range(40)]
    logits = make_logits(40, seed)
    untouched = logits.clone()
    assert tokens(logits, rows) == [
        reference(values, wanted) for values, wanted in zip(logits.double().tolist(), rows, strict=True)
    ]
    assert torch.equal(logits, untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_module, "GROUP_VALUES", 5 * VOCABULARY)
    randomness = random.Random(5)
    rows = [random_row(randomness) for _ in range(33)]
    logits = make_logits(33, 5).to(dtype)
    together = sample(logits, rows)
    assert together == [sample(logits[at : at + 1], rows[at : at + 1])[0] for at in range(33)]
    order = randomness.sample(range(33), 33)
    assert [together[at] for at in order] == sample(logits[order], [rows[at] for at in order])


# ---- greedy ----


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"logit_bias": {5: 0.0}}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_ties_go_to_the_lowest_id(extra: dict[str, Any], dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 5000, dtype=dtype)
    for at, tied in enumerate([(0, 4999), (700, 701, 3000), (64, 128)]):
        logits[at, list(tied)] = 2.0
    rows = [row(temperature=0.0, **extra)] * 3
    assert tokens(logits, rows) == [0, 700, 64]


def test_greedy_alone_is_one_search_and_makes_no_copy_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the slow path was taken")

    monkeypatch.setattr(sampling_module, "_sample_group", refuse)
    logits = make_logits(3)
    assert tokens(logits, [row(temperature=0.0)] * 3) == logits.argmax(-1).tolist()
    with pytest.raises(AssertionError, match="slow path"):
        sample(logits, [row(temperature=0.0), row(temperature=0.0), row()])


def test_no_rows_are_no_tokens() -> None:
    assert sample(torch.empty(0, VOCABULARY), []) == []


# ---- transformers' own processors ----

PROCESSORS = [
    ({"top_k": 5}, lambda: processors.TopKLogitsWarper(5)),
    ({"top_k": 500}, lambda: processors.TopKLogitsWarper(500)),
    ({"top_p": 0.2}, lambda: processors.TopPLogitsWarper(0.2)),
    ({"top_p": 0.95}, lambda: processors.TopPLogitsWarper(0.95)),
    ({"min_p": 0.05}, lambda: processors.MinPLogitsWarper(0.05)),
    ({"repetition_penalty": 1.4}, lambda: processors.RepetitionPenaltyLogitsProcessor(1.4)),
    ({"repetition_penalty": 0.6}, lambda: processors.RepetitionPenaltyLogitsProcessor(0.6)),
]


@pytest.mark.parametrize(("params", "build"), PROCESSORS)
def test_the_filters_keep_what_transformers_keeps(params: dict[str, Any], build: Any) -> None:
    """Drawn very often, exactly the tokens that transformers keeps appear, each as often as it should."""
    logits, history = make_logits(1, seed=3, vocabulary=12, spread=1.0), [1, 4, 4, 7]
    scores = build()(torch.tensor([history]), logits.clone())
    expected = scores.softmax(-1)[0].tolist()
    draws = 4000
    rows = [row(position=at, prompt=(1, 4), output=(4, 7), **params) for at in range(draws)]
    counts = Counter(tokens(logits.expand(draws, -1), rows))
    likely = {token for token, probability in enumerate(expected) if probability > 2e-3}
    assert likely <= set(counts) <= {token for token, probability in enumerate(expected) if probability > 0}
    for token, probability in enumerate(expected):
        assert abs(counts[token] / draws - probability) < 4 * math.sqrt(probability / draws) + 1e-9


# ---- the distribution ----


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_draws_follow_the_distribution(seed: int) -> None:
    """Chi-square with 19 degrees of freedom: 43.8 is passed by one fair run in a thousand; the seeds are fixed."""
    logits, draws = make_logits(1, seed=8, vocabulary=20, spread=1.0), 8000
    rows = [row(position=at, seed=seed, temperature=0.8) for at in range(draws)]
    counts = Counter(tokens(logits.expand(draws, -1), rows))
    expected = [probability * draws for probability in (logits[0].double() / 0.8).softmax(-1).tolist()]
    assert sum((counts[token] - mean) ** 2 / mean for token, mean in enumerate(expected)) < 43.8


def test_neighbouring_seeds_and_positions_are_independent() -> None:
    """Correlation of 4000 pairs: beyond 0.06 lies one fair run in seven thousand."""
    pairs = [
        [(uniform(seed, 5), uniform(seed + 1, 5)) for seed in range(4000)],
        [(uniform(5, position), uniform(5, position + 1)) for position in range(4000)],
        [(uniform(index, 9), uniform(9, index)) for index in range(4000)],
    ]
    for sample_ in pairs:
        correlation = 12 * sum((left - 0.5) * (right - 0.5) for left, right in sample_) / len(sample_)
        assert abs(correlation) < 0.06


def test_the_hash_is_splitmix64() -> None:
    """The published first outputs for seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(1234567, index) for index in range(4)] == published


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**64 - 1])
def test_uniform_is_in_range_for_every_seed(seed: int) -> None:
    assert all(0.0 <= uniform(seed, position) < 1.0 for position in (0, 1, 2**31))


@pytest.mark.parametrize("number", [0.0, 0.5, 1.0 - 2.0**-53])
def test_the_ends_of_the_range_choose_possible_tokens(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_module, "uniform", lambda *_: number)
    logits = torch.full((1, 9), float("-inf"))
    logits[0, [3, 5]] = 1.0
    expected = 3 if number < 0.5 else 5
    assert tokens(logits, [row()]) == [expected]
    assert tokens(logits, [row(temperature=1e-9, top_p=0.7, min_p=0.5, top_k=4)]) == [expected]


def test_a_tiny_temperature_is_greedy_and_overflows_nowhere() -> None:
    logits = make_logits(4, spread=1000.0)
    assert tokens(logits, [row(temperature=1e-30)] * 4) == logits.argmax(-1).tolist()


def test_a_wide_flat_distribution_is_sorted_in_full() -> None:
    """20,000 nearly equal tokens: the head that is looked at first does not hold half of the mass."""
    logits = make_logits(1, vocabulary=20_000, spread=0.01)
    kept = logits[0].argsort(descending=True)[:10_000].tolist()
    drawn = tokens(logits.expand(50, -1), [row(position=at, top_p=0.5) for at in range(50)])
    assert set(drawn) <= set(kept[:10_100])
    assert max(kept.index(token) for token in drawn) > 8000


# ---- log-probabilities ----


def test_logprobs_are_raw_and_best_first() -> None:
    logits = make_logits(3, seed=2)
    raw = logits.log_softmax(-1)
    biased = {"temperature": 0.0, "logit_bias": {11: 100.0}}
    alone, some, none = sample(logits, [row(logprobs=0, **biased), row(logprobs=4, **biased), row(**biased)])
    assert (alone.token_ids, some.token_ids, none.token_ids) == ((11,), (11,), (11,))
    assert none.logprobs == ()
    assert (alone.logprobs[0].token_id, alone.logprobs[0].top) == (11, ())
    assert alone.logprobs[0].logprob == raw[0, 11].item()
    best = raw[1].sort(descending=True)
    assert some.logprobs[0].top == tuple(zip(best.indices[:4].tolist(), best.values[:4].tolist(), strict=True))


def test_the_chosen_and_its_alternative_have_the_same_bits_and_ties_are_in_order() -> None:
    logits = torch.zeros(1, 40)
    logits[0, [9, 5, 30]] = 3.0
    (outcome,) = sample(logits, [row(temperature=0.0, logprobs=4)])
    found = outcome.logprobs[0]
    assert [token for token, _ in found.top] == [5, 9, 30, 0]
    assert found.top[0] == (found.token_id, found.logprob)


def test_more_alternatives_than_tokens() -> None:
    (outcome,) = sample(make_logits(1, vocabulary=3), [row(logprobs=20)])
    assert len(outcome.logprobs[0].top) == 3


@pytest.mark.parametrize("top", [0, 3])
def test_prompt_logprobs(top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_module, "GROUP_VALUES", 2 * VOCABULARY)
    logits, targets = make_logits(7, seed=4), [3, 1, 4, 1, 5, 9, 2]
    raw = logits.log_softmax(-1)
    found = prompt_logprobs(logits, targets, top)
    assert [entry.token_id for entry in found] == targets
    assert [entry.logprob for entry in found] == [raw[at, target].item() for at, target in enumerate(targets)]
    assert [[token for token, _ in entry.top] for entry in found] == raw.topk(top).indices.tolist()
    assert prompt_logprobs(logits[:0], [], top) == ()


# ---- what cannot be sampled ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.0, "logprobs": 1}, {}, {"top_p": 0.5}])
def test_logits_that_are_not_finite_give_no_token_and_no_scores(bad: float, params: dict[str, Any]) -> None:
    logits = make_logits(3)
    well = sample(logits, [row(**params)] * 3)
    logits[1, 7] = bad
    assert sample(logits, [row(**params)] * 3) == [well[0], RowTokens(), well[2]]
    assert prompt_logprobs(logits, [0, 0, 0], 1) == ()


def test_excluded_tokens_may_be_minus_infinity_and_are_no_alternatives() -> None:
    logits = make_logits(1)
    logits[0, :58] = float("-inf")
    (outcome,) = sample(logits, [row(temperature=1.0, min_p=0.01, logprobs=5)])
    assert {token for token, _ in outcome.logprobs[0].top} == {58, 59}
