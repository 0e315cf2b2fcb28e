"""Exact matches of the demo model on held-out questions, for every weight format: what quantization costs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from splitrun.api import plan
from splitrun.demo.tasks import TASKS, is_correct, questions
from splitrun.engine.engine import Engine
from splitrun.planner.facts import FORMATS
from splitrun.schedule.request import SamplingParams

SEED = 2
ANSWER_TOKENS = 64
CONTEXT = 256
SESSIONS = 16


@dataclass(frozen=True)
class Quality:
    """Of one weight format: questions asked and answered exactly, in all and per task."""

    weights: str
    asked: int
    exact: int
    tasks: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Exact answers among all."""
        return self.exact / max(self.asked, 1)


def measure(weights: str, count: int, memory: Mapping[str, str | int] | None = None) -> Quality:
    """Ask the demo ``count`` held-out questions, greedily, with its weights in that format."""
    asked = questions(count, SEED, held_out=True)
    placement = plan("demo", memory=memory, context=CONTEXT, sessions=SESSIONS, weights=weights)
    with Engine(placement) as engine:
        prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": each.prompt}]) for each in asked]
        answers = engine.generate(prompts, SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0))
    right = [is_correct(question, answer.text) for question, answer in zip(asked, answers, strict=True)]
    tasks = {}
    for task in TASKS:
        hits = [hit for hit, question in zip(right, asked, strict=True) if question.task == task]
        tasks[task] = (sum(hits), len(hits))
    return Quality(weights, len(asked), sum(right), tasks)


def table(count: int, memory: Mapping[str, str | int] | None = None, formats: Iterable[str] = FORMATS) -> list[Quality]:
    """One entry per weight format, most precise first."""
    return [measure(weights, count, memory) for weights in formats]


def to_text(entries: list[Quality]) -> str:
    """The table to read: exact matches per format, and where they were missed."""
    lines = [f"{'weights':8} {'exact':>12}   missed in"]
    for entry in entries:
        missed = [f"{task} {asked - hits} of {asked}" for task, (hits, asked) in entry.tasks.items() if hits < asked]
        score = f"{entry.exact}/{entry.asked}"
        lines.append(f"{entry.weights:8} {score:>9} {entry.share:6.1%}   {', '.join(missed) or 'none'}")
    return "\n".join(lines)
