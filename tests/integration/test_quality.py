"""Quality in nf4 and int8: the demo through our kernels against bitsandbytes' own dequantization in transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers

from splitrun import Engine, Placement, SamplingParams, plan
from splitrun.demo.tasks import questions
from splitrun.engine.link import Link
from splitrun.kernels.weight import Weight
from splitrun.model.files import resolve
from splitrun.stage.generic import RangeStage

ASKED = 12
WITHIN = 0.01
MEMORY = {"cpu": "2GiB"}


def dequantized(format: str, values: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes makes of values that it has quantized."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if format == "nf4":
        codes, state = functional.quantize_4bit(values.float(), blocksize=64, quant_type="nf4")
        found: torch.Tensor = functional.dequantize_4bit(codes, state)
        return found.view_as(values).to(values.dtype)
    codes, scales, _ = functional.int8_vectorwise_quant(values.half())
    found = functional.int8_vectorwise_dequant(codes, scales)
    return found.to(values.dtype)


def quantized_names(engine: Engine) -> list[str]:
    """The tensors that the engine holds in the format."""
    [link] = engine.core.pipeline.links
    assert isinstance(link, Link)
    assert isinstance(link.stage, RangeStage)
    model = link.stage.model
    found = []
    for name in model.own_names:
        owner, _, leaf = name.rpartition(".")
        if isinstance(getattr(model.skeleton.model.get_submodule(owner), leaf), Weight):
            found.append(name)
    return found


def asked(tokenizer: Any) -> list[tuple[list[int], int]]:
    """Questions with their answers, and where the answers begin."""
    found = []
    for each in questions(ASKED, 5, held_out=True):
        prompt = tokenizer.encode_chat([{"role": "user", "content": each.prompt}])
        found.append((prompt + tokenizer.encode(each.answer), len(prompt)))
    return found


def perplexity(logprobs: list[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


def reference_perplexity(format: str, names: list[str], prompts: list[tuple[list[int], int]]) -> float:
    """Of transformers in bf16 with those tensors dequantized by bitsandbytes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(resolve("demo", None).path, dtype=torch.bfloat16)
    model.eval()
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = dequantized(format, parameter.data)
    logprobs: list[float] = []
    with torch.inference_mode():
        for ids, start in prompts:
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].float().log_softmax(-1)
            logprobs += logits.gather(-1, torch.tensor(ids[start:]).unsqueeze(-1)).view(-1).tolist()
    return perplexity(logprobs)


def own_perplexity(placement: Placement, chunk_tokens: int) -> tuple[float, list[str], list[tuple[list[int], int]]]:
    """Of the engine; with what it holds quantized, and what it was asked."""
    with Engine(placement, chunk_tokens=chunk_tokens) as engine:
        prompts, names = asked(engine.tokenizer), quantized_names(engine)
        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        answers = engine.generate([ids for ids, _ in prompts], sampling)
    found = [
        entry.logprob
        for answer, (_, start) in zip(answers, prompts, strict=True)
        for entry in (answer.prompt_logprobs or ())[start:]
        if entry is not None
    ]
    assert len(found) == sum(len(ids) - start for ids, start in prompts)
    return perplexity(found), names, prompts


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_perplexity_is_that_of_bitsandbytes_dequantization(format: str) -> None:
    """Through the kernels for few rows (prompts in chunks of 16) and through those for prompts."""
    placement = plan("demo", memory=MEMORY, context=256, weights=format)
    few, names, prompts = own_perplexity(placement, 16)
    many, _, _ = own_perplexity(placement, 256)
    assert names
    expected = reference_perplexity(format, names, prompts)
    assert few == pytest.approx(expected, rel=WITHIN)
    assert many == pytest.approx(expected, rel=WITHIN)
