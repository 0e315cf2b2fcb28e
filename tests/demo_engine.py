"""The demo model over two virtual CPUs, and questions whose answers are known."""

from __future__ import annotations

import dataclasses
from typing import Any

import splitrun
from splitrun.planner.facts import Workload
from splitrun.planner.placement import KVSpec, ModelRef, Placement, StageSpec

LAYERS = 8
QUESTIONS = ("What is 27 + 15?", "Sort 31, 4, 159.", "What is 812 - 390?", "Write 345 in words.", "What is 7 + 8?")
ANSWERS = ("42", "4, 31, 159", "422", "three hundred forty-five", "15")


def demo_placement(
    source: str = "demo", *, weights: str = "fp32", blocks: int | None = None, sessions: int = 4, kv_dtype: Any = None
) -> Placement:
    """The demo model over two virtual CPUs."""
    kv = KVSpec(kv_dtype, device_blocks=blocks)
    stages = (
        StageSpec("cpu", True, (0, 5), False, weights, kv),
        StageSpec("cpu:1", False, (5, LAYERS), True, weights, kv),
    )
    return Placement(1, ModelRef(source, layers=LAYERS), Workload(256, sessions, block_tokens=16), stages)


def chat(engine: splitrun.Engine, question: str) -> list[int]:
    return engine.tokenizer.encode_chat([{"role": "user", "content": question}])


def greedy(**fields: object) -> splitrun.SamplingParams:
    return dataclasses.replace(splitrun.SamplingParams(max_tokens=24, temperature=0), **fields)
