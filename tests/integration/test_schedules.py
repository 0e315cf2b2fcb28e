"""Random schedules: requests that come, go and are cancelled at any time get the tokens that they get alone.

Over the processor and a device between its two stages: a second processor here, a card under the marker ``gpu``.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from transformers import AutoModelForCausalLM

import splitrun
from splitrun.demo import demo_path
from splitrun.engine.core import EngineCore
from splitrun.planner.facts import Workload
from splitrun.planner.placement import KVSpec, ModelRef, Placement, StageSpec
from splitrun.schedule.request import Request, TokenEvent

LAYERS = 8
NEW_TOKENS = 16
BLOCKS = 24
PATIENCE_S = 60.0
QUESTIONS = (
    "What is 27 + 15?",
    "What is 812 - 390?",
    "What is 7 + 8?",
    "Write 345 in words.",
    "Sort 31, 4, 159.",
    "Is 12 larger than 7?",
)
GREEDY = splitrun.SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
SAMPLED = splitrun.SamplingParams(max_tokens=NEW_TOKENS, temperature=4.0, seed=3, ignore_eos=True)
CARD_FORMATS = ["fp32", "bf16", "int8", "nf4"]


@dataclass
class Alone:
    """An engine, prompts, and what each of them gets when nobody else is there: (prompt, sampled) -> token ids."""

    engine: splitrun.Engine
    prompts: list[tuple[int, ...]]
    answers: dict[tuple[int, bool], tuple[int, ...]]


def placement(device: str, weights: str, blocks: int | None) -> Placement:
    """The demo model: embedding, four layers on the device, the others and the head."""
    kv = KVSpec(device_blocks=blocks)
    stages = (
        StageSpec("cpu", True, (0, 0), False, weights, kv),
        StageSpec(device, False, (0, 4), False, weights, kv),
        StageSpec("cpu", False, (4, LAYERS), True, weights, kv),
    )
    return Placement(1, ModelRef("demo", layers=LAYERS), Workload(96, sessions=16, block_tokens=8), stages)


def open_engine(device: str, weights: str) -> Iterator[Alone]:
    """With blocks for a fourth of the sessions, so that some requests are thrown out and computed again. No two prompts
    share a step: products of a card's libraries round by how many rows there are."""
    with splitrun.Engine(placement(device, weights, blocks=BLOCKS)) as engine:
        prompts = [tuple(engine.tokenizer.encode_chat([{"role": "user", "content": text}])) for text in QUESTIONS]
    longest = max(map(len, prompts))
    assert 2 * min(map(len, prompts)) > longest, "two of the prompts would fit into a step"
    with splitrun.Engine(placement(device, weights, blocks=BLOCKS), chunk_tokens=longest) as engine:
        answers = {
            (index, sampled): engine.generate([prompt], SAMPLED if sampled else GREEDY)[0].token_ids
            for index, prompt in enumerate(prompts)
            for sampled in (False, True)
        }
        yield Alone(engine, prompts, answers)


@dataclass
class Running:
    """A request under way, and what it got. It is cancelled from within when it has ``limit`` tokens."""

    core: EngineCore
    request: Request
    answer: tuple[int, ...]
    limit: int | None
    ids: list[int] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    fault: str | None = None

    def deliver(self, event: TokenEvent) -> None:
        self.ids += event.token_ids
        self.fault = event.error
        if len(self.ids) == self.limit:
            self.core.cancel(self.request.request_id)
        if event.finish_reason is not None or len(self.ids) == self.limit:
            self.ended.set()


def run_schedule(alone: Alone, seed: int) -> int:
    """One random schedule; returns how many requests came to their end in it."""
    draw, core = random.Random(seed), alone.engine.core
    requests = []
    for number in range(draw.randint(6, 24)):
        index, sampled = draw.randrange(len(alone.prompts)), draw.random() < 0.3
        request = Request(10_000 + number, alone.prompts[index], SAMPLED if sampled else GREEDY)
        limit = draw.randrange(1, NEW_TOKENS) if draw.random() < 0.2 else None
        requests.append(Running(core, request, alone.answers[index, sampled], limit))
        core.submit(request, requests[-1].deliver)
        if draw.random() < 0.3:
            time.sleep(draw.random() * 0.01)
    for request in requests:
        assert request.ended.wait(PATIENCE_S)
        assert request.fault is None
        assert tuple(request.ids) == request.answer[: request.limit], f"schedule {seed}, {request.request}"
    status = core.status()
    assert status.running == 0
    assert all(use.used == 0 for use in status.blocks.values())
    return sum(request.limit is None for request in requests)


def unsplit(prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What transformers' own greedy search gives in float32."""
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        answers.append(tuple(output[0, len(prompt) :].tolist()))
    return answers


def check(device: str, weights: str, schedules: int) -> None:
    for alone in open_engine(device, weights):
        if weights == "fp32":
            assert [alone.answers[index, False] for index in range(len(alone.prompts))] == unsplit(alone.prompts)
        ended = sum(run_schedule(alone, seed) for seed in range(schedules))
        assert ended > 4 * schedules, "most requests were cancelled"
        assert alone.engine.core.status().preemptions > 0


@pytest.mark.parametrize("weights", ["fp32", "nf4"])
def test_schedules_over_two_processors(weights: str) -> None:
    check("cpu:1", weights, schedules=3)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", CARD_FORMATS)
def test_fifty_schedules_over_a_card(weights: str) -> None:
    check("cuda:0", weights, schedules=50)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_graphs_change_no_bit(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one request to sixteen at once, over the sizes that graphs are captured for, with and without graphs."""
    from splitrun.stage.card_graph import Captures

    told = splitrun.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=3)
    found = []
    for graphs in (True, False):
        with monkeypatch.context() as patch:
            if not graphs:
                patch.setattr(Captures, "has", lambda self, key: True)
                patch.setattr(Captures, "run", lambda self, key, launch: launch())
            for alone in open_engine("cuda:0", weights):
                found.append(
                    [
                        alone.engine.generate([alone.prompts[index % 6] for index in range(count)], told)
                        for count in (1, 2, 3, 4, 5, 8, 9, 16)
                    ]
                )
    assert found[0] == found[1]
    single = found[0][0][0]
    assert all(several[0] == single for several in found[0])
