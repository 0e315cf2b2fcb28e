"""The engine over real stages: batching, preemption, cancelling, seeds, scores, and what broken input costs."""

from __future__ import annotations

import dataclasses
import json
import queue
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_models import write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import splitrun
import splitrun.schedule.request
from splitrun.demo import demo_path
from splitrun.errors import (
    ContextTooLong,
    CorruptWeights,
    DoesNotFit,
    InvalidPlacement,
    InvalidRequest,
    MissingWeights,
    StageError,
    UnsupportedModel,
)
from splitrun.planner.facts import Workload
from splitrun.planner.placement import KVSpec, ModelRef, Placement, StageSpec
from splitrun.schedule.request import Request, TokenEvent

LAYERS = 8
QUESTIONS = ("What is 27 + 15?", "Sort 31, 4, 159.", "What is 812 - 390?", "Write 345 in words.", "What is 7 + 8?")
ANSWERS = ("42", "4, 31, 159", "422", "three hundred forty-five", "15")


def demo_placement(
    source: str = "demo", *, weights: str = "fp32", blocks: int | None = None, sessions: int = 4
) -> Placement:
    """The demo model over two virtual CPUs."""
    kv = KVSpec(device_blocks=blocks)
    stages = (
        StageSpec("cpu", True, (0, 5), False, weights, kv),
        StageSpec("cpu:1", False, (5, LAYERS), True, weights, kv),
    )
    return Placement(1, ModelRef(source, layers=LAYERS), Workload(256, sessions, block_tokens=16), stages)


@pytest.fixture(scope="module")
def engine() -> splitrun.Engine:
    with splitrun.Engine(demo_placement()) as running:
        yield running


def chat(engine: splitrun.Engine, question: str) -> list[int]:
    return engine.tokenizer.encode_chat([{"role": "user", "content": question}])


def greedy(**fields: object) -> splitrun.SamplingParams:
    return dataclasses.replace(splitrun.SamplingParams(max_tokens=24, temperature=0), **fields)


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


def test_logits_that_are_not_finite_end_one_request_only(
    engine: splitrun.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = engine.core._pipeline._links[1].stage
    compute = stage.compute

    def spoil(step: Any, incoming: Any) -> Any:
        computed = compute(step, incoming)
        for row, wanted in enumerate(step.sampling):
            if wanted is not None and wanted.params.top_k == 7:
                computed.logits[row] = computed.logits[row] * float("nan")
        return computed

    monkeypatch.setattr(stage, "compute", spoil)
    bad, good = queue.SimpleQueue(), queue.SimpleQueue()
    ids = tuple(chat(engine, QUESTIONS[0]))
    engine.core.submit(splitrun.schedule.request.Request(10**9 + 1, ids, greedy(top_k=7)), bad.put)
    engine.core.submit(splitrun.schedule.request.Request(10**9 + 2, ids, greedy(max_tokens=1)), good.put)
    assert "NaN or infinity" in bad.get(timeout=60).error
    assert good.get(timeout=60).finish_reason == "length"
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
    ],
)
def test_a_bad_prompt_is_refused_before_it_costs_anything(
    engine: splitrun.Engine, prompt: list[int], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        engine.generate([prompt], greedy())
    assert engine.generate([chat(engine, QUESTIONS[0])], greedy())[0].text == ANSWERS[0]


def test_a_failing_step_costs_only_its_own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that raises once ends the requests of that step with an error; the engine goes on."""
    with splitrun.Engine(demo_placement()) as engine:
        prompt = chat(engine, QUESTIONS[0])
        stage = engine.core._pipeline._links[1].stage
        run = stage.run

        def fail_once(*arguments: object) -> object:
            monkeypatch.setattr(stage, "run", run)
            raise RuntimeError("a made-up fault\nwith a second line")

        monkeypatch.setattr(stage, "run", fail_once)
        with pytest.raises(
            StageError, match=r"stage layers 5–7 \+ head on cpu:1 failed: RuntimeError: a made-up fault$"
        ):
            engine.generate([prompt], greedy())
        assert engine.generate([prompt], greedy())[0].text == ANSWERS[0]
        assert engine.core.status().healthy


def test_health_returns_by_itself_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load balancer sends nothing to an unhealthy engine, so the engine tries its stages itself."""
    with splitrun.Engine(demo_placement()) as engine:
        stage = engine.core._pipeline._links[0].stage
        run = stage.run
        calls = []

        def fail_once(*arguments: Any) -> Any:
            calls.append(engine.core.status().healthy)
            if len(calls) == 1:
                raise RuntimeError("a made-up fault")
            return run(*arguments)

        monkeypatch.setattr(stage, "run", fail_once)
        with pytest.raises(StageError, match="made-up"):
            engine.generate([chat(engine, QUESTIONS[0])], greedy())
        for _ in range(600):
            if engine.core.status().healthy:
                break
            threading.Event().wait(0.05)
        assert engine.core.status().healthy
        assert calls == [True, False]


def test_a_full_device_costs_the_newest_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests fit into a step, a third does not: it ends with what mends it, and the others give their answers."""
    with splitrun.Engine(demo_placement(), depth=1) as engine:
        stage = engine.core._pipeline._links[0].stage
        run = stage.run

        def run_two(step: Any, incoming: Any) -> Any:
            if step.rows > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return run(step, incoming)

        monkeypatch.setattr(stage, "run", run_two)
        ends: dict[int, tuple[str, str]] = {}
        done = threading.Semaphore(0)

        def deliver(event: Any) -> None:
            if event.finish_reason is not None:
                ends[event.request_id] = (event.finish_reason, event.error or "")
                done.release()

        for number, question in zip((901, 902, 903), QUESTIONS, strict=False):
            request = splitrun.schedule.request.Request(number, tuple(chat(engine, question)), greedy())
            engine.core.submit(request, deliver)
        for _ in range(3):
            assert done.acquire(timeout=60)
        assert [ends[number][0] for number in (901, 902, 903)] == ["length", "length", "error"]
        assert "ran out of memory: plan with less context, fewer sessions" in ends[903][1]


def copy_demo(folder: Path) -> Path:
    """The demo as a directory of its own, to be broken."""
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copy(demo_path() / name, folder)
    return folder


def set_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.6.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.q_norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def write_garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def change_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 704
    (folder / "config.json").write_text(json.dumps(config))


def ask_for_remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my_own", "auto_map": {"AutoConfig": "modeling.Config"}}
    (folder / "config.json").write_text(json.dumps(config))


def leave_only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("harm", "error", "words"),
    [
        (set_nan, CorruptWeights, r"model\.layers\.6\.mlp\.up_proj\.weight.*NaN.*cpu:1, layer 6"),
        (drop_tensor, MissingWeights, r"model\.layers\.2\.self_attn\.q_norm\.weight"),
        (truncate, CorruptWeights, "model.safetensors"),
        (write_garbage, CorruptWeights, "model.safetensors"),
        (change_width, MissingWeights, "640.*704|704.*640"),
        (ask_for_remote_code, UnsupportedModel, "code"),
        (leave_only_pickles, UnsupportedModel, "pickle"),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(
    tmp_path: Path, harm: object, error: type[Exception], words: str
) -> None:
    folder = copy_demo(tmp_path)
    harm(folder)
    with pytest.raises(error, match=words) as raised:
        splitrun.Engine(demo_placement(str(folder)))
    assert "\n" not in str(raised.value)


def test_a_changed_model_makes_the_placement_stale(tmp_path: Path) -> None:
    folder = copy_demo(tmp_path)
    plan = splitrun.plan(str(folder), context=256)
    change_width(folder)
    with pytest.raises(InvalidPlacement, match=r"changed since it was planned: plan again with splitrun plan"):
        splitrun.Engine(plan)


def test_a_placement_of_other_layers_is_refused() -> None:
    plan = Placement(1, ModelRef("demo", layers=6), Workload(256), (StageSpec("cpu", True, (0, 6), True),))
    with pytest.raises(InvalidPlacement, match="splits 6 layers, but demo has 8"):
        splitrun.Engine(plan)


@pytest.mark.parametrize(
    ("device", "fields", "words"),
    [
        ("cuda:97", {}, "no such device here; `splitrun doctor` lists"),
        ("attic/cpu", {}, "attic/cpu: this machine is no node yet"),
        ("cpu", {"stream_buffer_bytes": 4096}, "stream_buffer 4096 is memory of a card"),
        ("cuda:0", {"stream_from_tokens": 64}, "stream_from 64 is for layers on the processor"),
        ("cpu", {"kv": KVSpec(host_blocks=3)}, "host_blocks 3 is not supported"),
    ],
)
def test_what_cannot_be_done_is_refused_before_loading(device: str, fields: dict[str, object], words: str) -> None:
    stage = StageSpec(device, True, (0, LAYERS), True, **fields)
    with pytest.raises(InvalidPlacement, match=words):
        splitrun.Engine(Placement(1, ModelRef("demo", layers=LAYERS), Workload(256), (stage,)))


@pytest.mark.parametrize(
    ("sessions", "budget", "words"),
    [
        (
            60000,
            "1GiB",
            r"KV of cpu take .* its budget is 1.00 GiB: lower context \(512\) or sessions \(60000\)",
        ),
        (1, "1MiB", r"take .* MiB, but its budget is 1.00 MiB"),
        (65536, None, r"but free there are"),
    ],
)
def test_a_placement_by_hand_is_held_to_memory(tmp_path: Path, sessions: int, budget: str | None, words: str) -> None:
    file = tmp_path / "plan.yaml"
    devices = f"devices: {{cpu: {{memory: {budget}}}}}\n" if budget else ""
    file.write_text(
        f"version: 1\nmodel: {{source: demo}}\nworkload: {{context: 512, sessions: {sessions}}}\n{devices}"
        "stages:\n  - {device: cpu, units: [embed, head], layers: [0, 8]}\n"
    )
    with pytest.raises(DoesNotFit, match=words) as raised:
        splitrun.Engine(file)
    assert raised.value.shortfall_bytes["cpu"] > 0


def test_a_context_beyond_the_model_is_refused() -> None:
    plan = Placement(1, ModelRef("demo", layers=8), Workload(8192), (StageSpec("cpu", True, (0, 8), True),))
    with pytest.raises(InvalidPlacement, match="holds 8192 tokens, but demo computes at most 4096 exactly"):
        splitrun.Engine(plan)


def test_closing_leaves_a_stuck_stage_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitrun.engine.pipeline.CLOSING_S", 0.2)
    engine = splitrun.Engine(demo_placement())
    stuck = threading.Event()
    reached = threading.Event()

    def hang(*arguments: Any) -> None:
        reached.set()
        stuck.wait(60)

    monkeypatch.setattr(engine.core._pipeline._links[0].stage, "run", hang)
    engine.core.submit(splitrun.schedule.request.Request(7, (3,), greedy()), lambda event: None)
    assert reached.wait(60)
    engine.close()
    stuck.set()


def test_an_internal_error_ends_requests_instead_of_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop dies on our own bug: whoever waits is told, and new requests are refused."""
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    with splitrun.Engine(demo_placement()) as engine:
        monkeypatch.setattr(engine.core._scheduler, "commit", lambda tokens: 1 / 0)
        prompt = chat(engine, QUESTIONS[0])
        for _ in range(2):
            with pytest.raises(StageError, match=r"internal error|shutting down"):
                engine.generate([prompt], greedy())
        assert not engine.core.status().healthy


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


def test_what_was_committed_is_handed_out_before_the_engine_closes() -> None:
    """A receiver slower than the stages: every token and the end reach it, though the engine is closed at once."""
    engine = splitrun.Engine(demo_placement())
    events: list[TokenEvent] = []

    def slowly(event: TokenEvent) -> None:
        time.sleep(0.03)
        events.append(event)

    engine.core.submit(Request(77, (5, 6, 7), greedy(max_tokens=12, ignore_eos=True)), slowly)
    engine.core.drain()
    engine.close()
    assert sum(len(event.token_ids) for event in events) == 12
    assert [event.finish_reason for event in events if event.finish_reason] == ["length"]
    assert events[-1].finish_reason == "length"


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
