"""Grade 1 of "the same tokens": in float32, every cut of every architecture gives transformers' own greedy ids."""

from __future__ import annotations

import pytest
from cut_models import ARCHITECTURES, NEW_TOKENS, TinyModel, tiny_model

import splitrun
from splitrun.planner.facts import Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec
from splitrun.schedule.request import TokenLogprob

GREEDY = splitrun.SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=20)
CHUNK = 8


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def placement(model: TinyModel, bounds: list[int], devices: list[str]) -> Placement:
    """Stages between consecutive bounds, in units: 0 before the embedding, layers + 2 behind the head."""
    count = model.layers
    stages = tuple(
        StageSpec(
            device,
            embed=start == 0,
            layers=(max(start - 1, 0), min(max(stop - 1, 0), count)),
            head=stop == count + 2,
            weights="fp32",
        )
        for start, stop, device in zip(bounds, bounds[1:], devices, strict=False)
    )
    workload = Workload(context=64, sessions=3, block_tokens=4)
    return Placement(1, ModelRef(str(model.path), layers=count), workload, stages)


def check(model: TinyModel, plan: Placement, depth: int) -> None:
    """One request alone, then three of different lengths at once: ids identical, log-probabilities within 1e-4."""
    with splitrun.Engine(plan, depth=depth, chunk_tokens=CHUNK) as engine:
        for chosen in ((0,), (0, 1, 2)):
            completions = engine.generate([model.prompts[index] for index in chosen], GREEDY)
            for index, completion in zip(chosen, completions, strict=True):
                assert completion.token_ids == model.answers[index]
                compare(completion.logprobs, model, index)
        assert all(use.used == 0 for use in engine.core.status().blocks.values())


def compare(logprobs: tuple[TokenLogprob, ...], model: TinyModel, index: int) -> None:
    assert len(logprobs) == NEW_TOKENS
    for entry, expected in zip(logprobs, model.logprobs[index], strict=True):
        for token_id, logprob in ((entry.token_id, entry.logprob), *entry.top):
            assert abs(logprob - float(expected[token_id])) < 1e-4


def test_every_cut_gives_the_unsplit_ids(model: TinyModel) -> None:
    for cut in range(1, model.layers + 2):
        for depth in (1, 3):
            check(model, placement(model, [0, cut, model.layers + 2], ["cpu", "cpu:1"]), depth)


def test_a_device_used_twice_gives_the_unsplit_ids(model: TinyModel) -> None:
    bounds = [0, 1, model.layers + 1, model.layers + 2]
    check(model, placement(model, bounds, ["cpu", "cpu:1", "cpu"]), depth=2)


@pytest.mark.gpu
def test_every_cut_through_a_gpu_gives_the_unsplit_ids(model: TinyModel) -> None:
    """CPU, GPU, CPU: the GPU computes one unit, or everything from a unit on."""
    end = model.layers + 2
    for start in range(end):
        for stop in {start + 1, end}:
            bounds = sorted({0, start, stop, end})
            devices = ["cuda:0" if bound == start else "cpu" for bound in bounds[:-1]]
            for depth in (1, 3):
                check(model, placement(model, bounds, devices), depth)
