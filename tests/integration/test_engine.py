"""The engine over real stages: batching, preemption, cancelling, seeds, scores."""

from __future__ import annotations

import dataclasses
import gc
import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_models import write_checkpoint
from demo_engine import ANSWERS, LAYERS, QUESTIONS, chat, demo_placement, greedy
from transformers import AutoModelForCausalLM

import splitrun
import splitrun.schedule.request
from splitrun.demo import demo_path
from splitrun.errors import ContextTooLong, InvalidRequest, StageError
from splitrun.planner.facts import Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec


@pytest.fixture(scope="module")
def engine() -> splitrun.Engine:
    with splitrun.Engine(demo_placement()) as running:
        yield running


def test_concurrent_requests_get_their_own_answers(engine: splitrun.Engine) -> None:
    completions = engine.generate([chat(engine, question) for question in QUESTIONS], greedy())
    assert tuple(completion.text for completion in completions) == ANSWERS
    assert {completion.finish_reason for completion in completions} == {"stop"}


def test_streaming_gives_the_same_text(engine: splitrun.Engine) -> None:
    events = list(engine.stream(chat(engine, QUESTIONS[3]), greedy()))
    assert "".join(event.text for event in events) == ANSWERS[3]
    assert events[-1].finish_reason == "stop"


def test_preemption_loses_no_token(engine: splitrun.Engine) -> None:
    """Four sessions of up to 96 tokens on six blocks of 16: sequences are thrown out and computed again."""
    sampling = greedy(max_tokens=60, ignore_eos=True)
    prompts = [chat(engine, question) for question in QUESTIONS]
    expected = [completion.token_ids for completion in engine.generate(prompts, sampling)]
    with splitrun.Engine(demo_placement(blocks=6)) as small:
        completions = small.generate(prompts, sampling)
        assert small.core.status().preemptions > 0
    assert [completion.token_ids for completion in completions] == expected


@pytest.mark.parametrize("weights", ["fp32", "nf4"])
def test_int8_keys_and_values_answer_the_same(weights: str) -> None:
    """By the layers' own code and by the kernels, with sequences thrown out and computed again."""
    with splitrun.Engine(demo_placement(weights=weights, blocks=6, kv_dtype="int8")) as engine:
        completions = engine.generate([chat(engine, question) for question in QUESTIONS], greedy())
    assert tuple(completion.text for completion in completions) == ANSWERS


def test_parts_of_one_device_in_formats_of_their_own() -> None:
    """Embedding in bf16, layers in nf4, head in int8: with sampling, the very tokens of a head on another device."""
    sampled = splitrun.SamplingParams(max_tokens=30, temperature=4.0, seed=7, ignore_eos=True)

    def tokens(head: str) -> list[tuple[int, ...]]:
        stages = (
            StageSpec("cpu", True, (0, 0), False, "bf16"),
            StageSpec("cpu", False, (0, LAYERS), False, "nf4"),
            StageSpec(head, False, (LAYERS, LAYERS), True, "int8"),
        )
        plan = Placement(1, ModelRef("demo", layers=LAYERS), Workload(context=128, sessions=4), stages)
        with splitrun.Engine(plan) as engine:
            answers = engine.generate([chat(engine, question) for question in QUESTIONS], greedy())
            assert tuple(answer.text for answer in answers) == ANSWERS
            return [answer.token_ids for answer in engine.generate([chat(engine, QUESTIONS[0])], sampled)]

    assert tokens("cpu") == tokens("cpu:1")


def test_the_same_seed_gives_the_same_text_in_any_company(engine: splitrun.Engine) -> None:
    sampled = splitrun.SamplingParams(max_tokens=20, temperature=6.0, seed=11, ignore_eos=True)
    prompts = [chat(engine, question) for question in QUESTIONS]
    alone = engine.generate([prompts[0]], sampled)[0]
    together = engine.generate(prompts, sampled)[0]
    other = engine.generate([prompts[0]], dataclasses.replace(sampled, seed=12))[0]
    assert alone.token_ids == together.token_ids
    assert alone.token_ids != other.token_ids


def test_n_completions_are_numbered_seeds(engine: splitrun.Engine) -> None:
    sampled = splitrun.SamplingParams(max_tokens=12, temperature=6.0, seed=5, ignore_eos=True)
    prompt = chat(engine, QUESTIONS[0])
    several = engine.generate([prompt], dataclasses.replace(sampled, n=3))
    single = [engine.generate([prompt], dataclasses.replace(sampled, seed=5 + index))[0] for index in range(3)]
    assert [completion.token_ids for completion in several] == [completion.token_ids for completion in single]


def test_a_stop_string_ends_the_text(engine: splitrun.Engine) -> None:
    completion = engine.generate([chat(engine, QUESTIONS[3])], greedy(stop=(" forty",)))[0]
    assert (completion.text, completion.finish_reason) == ("three hundred", "stop")
    assert all(use.used == 0 for use in engine.core.status().blocks.values())


def test_leaving_a_stream_frees_its_blocks(engine: splitrun.Engine) -> None:
    stream = engine.stream(chat(engine, QUESTIONS[3]), greedy(max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    status = engine.core.status()
    assert status.running == 0
    assert all(use.used == 0 for use in status.blocks.values())


def test_more_prompts_than_the_queue_holds_are_all_answered(engine: splitrun.Engine) -> None:
    prompts = [chat(engine, QUESTIONS[index % 5])[:6] for index in range(1100)]
    completions = engine.generate(prompts, greedy(max_tokens=1, ignore_eos=True))
    assert len(completions) == 1100
    assert all(len(completion.token_ids) == 1 for completion in completions)


def test_nothing_runs_when_one_prompt_cannot(engine: splitrun.Engine) -> None:
    before = engine.core.status().prompt_tokens
    with pytest.raises(ContextTooLong):
        engine.generate([chat(engine, QUESTIONS[0]), [3] * 300], greedy())
    assert engine.core.status().prompt_tokens == before


def test_a_stream_refuses_at_once(engine: splitrun.Engine) -> None:
    with pytest.raises(ContextTooLong):
        engine.stream([3] * 300, greedy())
    with pytest.raises(InvalidRequest, match="one completion"):
        engine.stream([3], greedy(n=2))


def test_a_receiver_that_fails_loses_only_its_own_request(engine: splitrun.Engine) -> None:
    ids = tuple(chat(engine, QUESTIONS[3]))
    engine.core.submit(splitrun.schedule.request.Request(10**9, ids, greedy()), lambda event: 1 / 0)
    assert engine.generate([chat(engine, QUESTIONS[0])], greedy())[0].text == ANSWERS[0]


def test_a_text_that_cannot_be_made_ends_the_wait(engine: splitrun.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("splitrun.engine.engine.TextStream.push", lambda *arguments: 1 / 0)
        with pytest.raises(StageError, match="text could not be made"):
            engine.generate([chat(engine, QUESTIONS[0])], greedy())
    assert engine.generate([chat(engine, QUESTIONS[0])], greedy())[0].text == ANSWERS[0]


@pytest.mark.parametrize("scored", [False, True], ids=["chosen", "scored"])
def test_logits_that_are_not_finite_end_one_request_only(
    engine: splitrun.Engine, monkeypatch: pytest.MonkeyPatch, scored: bool
) -> None:
    """Whether a token is to be chosen from them or the prompt is to be scored, in the middle of it or at its end."""
    stage = engine.core.pipeline.links[1].stage
    forward, ids = stage.model.forward, 2 * tuple(chat(engine, QUESTIONS[0]))
    bad_ids = (9, *ids)
    assert ids[0] != bad_ids[0]

    def spoil(tokens: torch.Tensor, *arguments: Any) -> torch.Tensor:
        logits = forward(tokens, *arguments)
        logits[tokens[:, 0] == bad_ids[0]] = float("nan")
        return logits

    monkeypatch.setattr(stage.model, "forward", spoil)
    bad, good = queue.SimpleQueue(), queue.SimpleQueue()
    request = splitrun.schedule.request.Request
    wanted = greedy(prompt_logprobs=1) if scored else greedy(top_k=7, logprobs=0)
    engine.core.submit(request(10**9 + 1, bad_ids, wanted), bad.put)
    engine.core.submit(request(10**9 + 2, ids, greedy(max_tokens=1, prompt_logprobs=1)), good.put)
    ended = bad.get(timeout=60)
    assert ended.finish_reason == "error"
    assert ended.error is not None
    assert "NaN or infinity" in ended.error
    assert "\n" not in ended.error
    scores = good.get(timeout=60)
    assert scores.finish_reason == "length"
    assert len(scores.prompt_logprobs) == len(ids)
    assert engine.core.status().healthy


def test_prompt_scores_equal_transformers(engine: splitrun.Engine) -> None:
    ids = chat(engine, QUESTIONS[1]) * 2
    completion = engine.generate([ids], greedy(max_tokens=1, prompt_logprobs=2))[0]
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    scores = completion.prompt_logprobs
    assert scores is not None
    assert len(scores) == len(ids)
    assert scores[0] is None
    for position, score in enumerate(scores[1:]):
        assert score is not None
        assert score.token_id == ids[position + 1]
        assert abs(score.logprob - float(expected[position, score.token_id])) < 1e-4
        assert score.top[0][0] == int(expected[position].argmax())


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([], InvalidRequest, "no tokens"),
        ([5000], InvalidRequest, "5000"),
        ([3] * 300, ContextTooLong, "plan with --context"),
        (["a"], InvalidRequest, "token ids"),
        (5, InvalidRequest, "a prompt is a text or a list of token ids"),
    ],
)
def test_a_bad_prompt_is_refused_before_it_costs_anything(
    engine: splitrun.Engine, prompt: list[int], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        engine.generate([prompt], greedy())
    assert engine.generate([chat(engine, QUESTIONS[0])], greedy())[0].text == ANSWERS[0]


@pytest.mark.parametrize("token", [-1, 10**10, 2**63])
def test_an_id_that_is_none_is_refused_before_it_is_made_text(token: int, engine: splitrun.Engine) -> None:
    for ask in (lambda: engine.generate([[token]]), lambda: engine.stream([token])):
        with pytest.raises(InvalidRequest, match=str(token)):
            ask()


def test_what_is_no_list_of_prompts_is_refused(engine: splitrun.Engine) -> None:
    with pytest.raises(InvalidRequest, match="and this is of type NoneType"):
        engine.generate(None)  # type: ignore[arg-type]


def test_an_engine_that_is_forgotten_is_closed() -> None:
    engine = splitrun.Engine(demo_placement())
    core = engine.core
    assert engine.generate([chat(engine, QUESTIONS[0])], greedy())[0].text == ANSWERS[0]
    del engine
    gc.collect()
    assert core.closed.wait(20)
    core._thread.join(20)
    assert not core._thread.is_alive()


def test_in_a_forked_process_an_engine_says_whose_it_is() -> None:
    """Its threads are not there: whoever waited for them would wait for ever."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.splitlines() == ["refused", "closed", "42"], done.stderr[-2000:]


FORKED = """
import os, signal, sys
import splitrun
from splitrun.errors import StageLost
engine = splitrun.Engine(splitrun.plan("demo", memory={"cpu": "1GiB"}, weights="bf16"))
if os.fork() == 0:
    signal.alarm(20)
    try:
        engine.generate(["x"])
    except StageLost as error:
        print("refused" if "belongs to process" in str(error) else error, flush=True)
    engine.close()
    print("closed", flush=True)
    os._exit(0)
os.wait()
with engine:
    ids = engine.tokenizer.encode_chat([{"role": "user", "content": "What is 27 + 15?"}])
    print(engine.generate([ids], splitrun.SamplingParams(max_tokens=8, temperature=0))[0].text)
"""


def test_one_text_is_no_list_of_prompts(engine: splitrun.Engine) -> None:
    with pytest.raises(InvalidRequest, match="write it in brackets"):
        engine.generate(QUESTIONS[0], greedy())


def test_a_sliding_window_pays_for_its_window_only(tmp_path: Path) -> None:
    """Window 8, context 1024: the sliding pool holds a few blocks, not 256, and long sequences still run."""
    write_checkpoint("gemma3_text", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["num_hidden_layers"]
    config["max_position_embeddings"] = 2048
    (tmp_path / "config.json").write_text(json.dumps(config))
    workload = Workload(context=1024, block_tokens=4, chunk_tokens=16)
    plan = Placement(
        1, ModelRef(str(tmp_path), layers=layers), workload, (StageSpec("cpu", True, (0, layers), True, "fp32"),)
    )
    prompt = torch.randint(3, 120, (1, 300), generator=torch.Generator().manual_seed(3))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)[0, 300:]
    with splitrun.Engine(plan) as engine:
        blocks = {name: use.total for name, use in engine.core.status().blocks.items()}
        completion = engine.generate([prompt[0].tolist()], greedy(max_tokens=8, ignore_eos=True))[0]
    assert blocks == {"sliding(8)": 7, "full": 256}
    assert completion.token_ids == tuple(expected.tolist())


def test_the_worker_of_an_embedding_alone_ends_with_the_others() -> None:
    stages = (
        StageSpec("cpu", True, (0, 0), False, "fp32"),
        StageSpec("cpu:1", False, (0, LAYERS), True, "fp32"),
    )
    before = set(threading.enumerate())
    with splitrun.Engine(Placement(1, ModelRef("demo", layers=LAYERS), Workload(256), stages)) as engine:
        names = {thread.name for thread in set(threading.enumerate()) - before}
        assert "splitrun cpu:1" in names
        assert "splitrun cpu" not in names
        assert engine.generate([[5, 6, 7]], greedy(max_tokens=3, ignore_eos=True))[0].token_ids
    assert set(threading.enumerate()) <= before
