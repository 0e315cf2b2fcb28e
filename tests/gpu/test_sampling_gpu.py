"""Sampling on a CUDA device chooses what the CPU chooses, alone and in a batch, within a bounded workspace."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from splitrun.schedule.request import SamplingParams
from splitrun.schedule.step import RowSampling
from splitrun.stage.sampling import sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCABULARY = 151_936

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 1.3, "top_k": 400, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 0.0, "repetition_penalty": 1.2, "logit_bias": {17: 4.0}},
    {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
]


def make_rows(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[RowSampling]]:
    randomness, generator = random.Random(1), torch.Generator().manual_seed(1)
    logits = (torch.randn(count, VOCABULARY, generator=generator) * 2.5).to(dtype)
    rows = []
    for at in range(count):
        history = tuple(randomness.randrange(VOCABULARY) for _ in range(64))
        params = SamplingParams(**PARAMS[at % len(PARAMS)])
        rows.append(RowSampling(params, randomness.getrandbits(64), at, history[:32], history[32:]))
    return logits, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_device_chooses_what_the_cpu_chooses_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    logits, rows = make_rows(28, dtype)
    on_device = logits.cuda()
    together = sample(on_device, rows)
    assert together == sample(logits, rows)
    assert together == [sample(on_device[at : at + 1], rows[at : at + 1])[0] for at in range(28)]


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, VOCABULARY, device="cuda", dtype=torch.bfloat16)
    logits[0, [70_000, 140_000]] = 1.0
    rows = [RowSampling(SamplingParams(temperature=0.0), 0, 0)] * 2
    assert [outcome.token_ids for outcome in sample(logits, rows)] == [(70_000,), (0,)]


def test_the_workspace_does_not_grow_with_the_rows() -> None:
    peaks = []
    for count in (7, 28):
        logits, rows = make_rows(count, torch.bfloat16)
        on_device = logits.cuda()
        sample(on_device, rows)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sample(on_device, rows)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    print(f"sampling workspace: {peaks[1] / 2**20:.1f} MiB")
    assert peaks[1] <= 1.2 * peaks[0]
    assert peaks[1] < 48 * 2**20
