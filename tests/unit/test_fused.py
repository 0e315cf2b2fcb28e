"""Layers run by one kernel against the same layers run by their own code; and which layers are taken at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pytest
import torch
from native_library import compiled_levels
from torch import Tensor
from transformers import AutoConfig

from splitrun.kernels.cpu import many
from splitrun.kernels.cpu.settings import PROMPT_VARIABLE
from splitrun.kernels.formats import quantize
from splitrun.kernels.int8_kv import quantize_kv
from splitrun.kernels.weight import install
from splitrun.model.cut import CutModel, CutRange
from splitrun.model.structure import ModelStructure, inspect
from splitrun.planner.placement import STREAM_FROM_TOKENS
from splitrun.schedule.step import Step
from splitrun.stage import fused, load
from splitrun.stage.decoding import Decoding
from splitrun.stage.generic import GenericStage, RangeStage
from splitrun.stage.load import StageSize, load_stage

LEVELS = compiled_levels()
pytestmark = [
    pytest.mark.skipif(not LEVELS, reason="nothing is compiled here"),
    pytest.mark.usefixtures("one_thread"),
]
BLOCK_TOKENS, BLOCKS, LAYERS = 4, 16, 2
SIZES = {
    **{"hidden_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 8},
    **{"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 128},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 7},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
    "phi3": {
        "pad_token_id": 0,
        "intermediate_size": 192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}
WIDE = {"head_dim": 32}
"""Heads that are attended to by dot products of bf16, where the processor has them."""
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "cohere": {},
    "olmo2": {},
}


@dataclass
class Run:
    """A stage with its steps so far."""

    stage: RangeStage
    structure: ModelStructure
    lengths: dict[int, int]
    blocks: int = BLOCKS
    index: int = 0

    def feed(self, rows: dict[int, Sequence[int]], replay: bool = False, prepare: bool = False) -> dict[int, Tensor]:
        """Run tokens of some sequences as one step. Shape of each result: (tokens, hidden)."""
        counts, step = [len(ids) for ids in rows.values()], step_of(self, rows, replay)
        self.index += 1
        if prepare:
            assert isinstance(self.stage, GenericStage)
            self.stage.prepare(replace(step, token_ids=numpy.zeros_like(step.token_ids)))  # this one does not come
            known = step.token_ids.copy()
            step.token_ids[:] = 0
            self.stage.prepare(step)
            step.token_ids[:] = known
        activation = self.stage.compute(step, None).activation
        assert activation is not None
        for row, ids in rows.items():
            self.lengths[row] = self.lengths.get(row, 0) + len(ids)
        return dict(zip(rows, activation.split(counts), strict=True))


def step_of(run: Run, rows: dict[int, Sequence[int]], replay: bool = False) -> Step:
    """Tokens of some sequences behind those that the run has fed."""
    counts = [len(ids) for ids in rows.values()]
    tables = numpy.array([[row * run.blocks + block for block in range(run.blocks)] for row in rows], dtype=numpy.int32)
    return Step(
        index=run.index,
        epoch=0,
        token_ids=numpy.array([token for ids in rows.values() for token in ids], dtype=numpy.int32),
        query_starts=numpy.cumsum([0, *counts]).astype(numpy.int32),
        context_lengths=numpy.array([run.lengths.get(row, 0) for row in rows], dtype=numpy.int32),
        slots=numpy.array(list(rows), dtype=numpy.int32),
        block_tables={group.name: tables for group in run.structure.groups},
        sampling=(None,) * len(rows),
        replay=(replay,) * len(rows),
    )


def make(
    name: str,
    overrides: dict[str, Any],
    format: str = "nf4",
    dtype: str = "bf16",
    blocks: int = BLOCKS,
    prompt_card: Any = None,
    prompt_tokens: int = STREAM_FROM_TOKENS,
    head: bool = False,
    kv: str | None = None,
) -> tuple[Run, list[bool]]:
    """A stage of embedding and layers with random weights, and which layers have the kernel."""
    inner = {"intermediate_size": 192 if format == "nf4" else 212}
    config = AutoConfig.for_model(name, **(SIZES | inner | overrides))
    structure = inspect(config)
    generator = torch.Generator().manual_seed(11)

    def fill(model: CutModel) -> int:
        for own in model.own_names:
            shape = model.skeleton.model.get_parameter(own).shape
            noise = torch.randn(shape, generator=generator)
            if len(shape) < 2:
                install(model.skeleton.model, own, (1 + 0.3 * noise).to(model.dtype))
            elif "embed" in own:
                install(model.skeleton.model, own, noise.to(model.dtype))
            else:
                install(model.skeleton.model, own, quantize(noise * 1.5 / shape[-1] ** 0.5, format, model.dtype))
        return 0

    pools = {group.name: blocks * 3 for group in structure.groups}
    size = StageSize("cpu", dtype, kv or dtype, pools, BLOCK_TOKENS, 3)
    cut = CutRange(True, 0, LAYERS, head)
    stage = load_stage(config, structure, cut, size, fill, prompt_card=prompt_card, prompt_tokens=prompt_tokens)
    taken = [isinstance(stage.model._inner[index].forward, fused._Forward) for index in range(LAYERS)]
    return Run(stage, structure, {}, blocks), taken


def generic(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Run:
    with monkeypatch.context() as patch:
        patch.setattr(load, "fuse", lambda *arguments: fused.Fused())
        run, taken = make(*arguments)
    assert not any(taken)
    return run


def tokens(count: int, seed: int = 3) -> list[int]:
    return torch.randint(3, 64, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("format", "dtype"), [("nf4", "bf16"), ("int8", "bf16"), ("nf4", "fp16"), ("bf16", "bf16")])
def test_as_the_layers_own_code(name: str, format: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As close to the exact products as the layers' own code over the same kernels: a prompt by that code, then single
    tokens and groups across block borders and windows."""
    run, taken = make(name, MODELS[name], format, dtype)
    assert all(taken)
    reference, exact = (
        generic(monkeypatch, name, MODELS[name], format, dtype),
        make(name, MODELS[name], format, "fp32")[0],
    )
    ids = tokens(40)
    errors = []
    for start, stop in ((0, 18), (18, 19), (19, 20), (20, 25), (25, 26), (26, 39), (39, 40)):
        found, own, wanted = (stage.feed({0: ids[start:stop]})[0].double() for stage in (run, reference, exact))
        errors.append([((result - wanted).norm() / wanted.norm()).item() for result in (found, own)])
        assert errors[-1][0] < 0.06, (start, stop)
    fused_error, own_error = torch.tensor(errors).mean(0).tolist()
    assert fused_error < 1.25 * own_error
    for index, store in run.stage._stores.items():
        other = exact.stage._stores[index]
        for mine, theirs in ((store.keys, other.keys), (store.values, other.values)):
            assert ((mine.double() - theirs.double()).norm() / theirs.double().norm()).item() < 0.06


@pytest.mark.parametrize(("name", "kv"), [*((name, None) for name in MODELS), ("qwen3", "int8"), ("mistral", "int8")])
def test_a_token_depends_on_its_history_alone(name: str, kv: str | None) -> None:
    """Alone, in groups, beside others and on more threads: the same bits."""
    overrides = MODELS[name] | (WIDE if name == "qwen3" else {})
    ids, other, third = tokens(30), tokens(30, 4), tokens(30, 5)
    alone, taken = make(name, overrides, kv=kv)
    assert all(taken)
    expected = torch.cat([alone.feed({0: [token]})[0] for token in ids])
    for size in (2, 5, 16):
        run, _ = make(name, overrides, kv=kv)
        found = [run.feed({0: ids[start : start + size]})[0] for start in range(0, len(ids), size)]
        assert torch.equal(torch.cat(found), expected), size
    torch.set_num_threads(3)
    run, _ = make(name, overrides, kv=kv)
    run.feed({1: other[:5], 2: third[:5]})
    found = []
    for start in range(0, 30, 5):  # up to 3 x 5 tokens in a call, sequences at other positions
        part = slice(start, start + 5)
        rows = {2: third[part], 0: ids[part], 1: other[part]} if start < 25 else {0: ids[part]}
        found.append(run.feed(rows)[0])
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral"])
def test_int8_keys_and_values_are_those_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel stores is to the bit what quantizing gives of what it stores in float32; what it computes is as
    near to that as the layers' own code over the same definition, a prompt first, then groups and single tokens."""
    overrides = MODELS[name] | (WIDE if name == "qwen3" else {})
    ids, parts = tokens(40), ((0, 18), (18, 19), (19, 24), (24, 39), (39, 40))
    one, exact = (make(name, overrides, kv=kv)[0] for kv in ("int8", "fp32"))
    one.feed({0: ids[:16]})
    exact.feed({0: ids[:16]})
    mine, wide = one.stage._stores[0], exact.stage._stores[0]
    assert mine.scales is not None
    for codes, scales, pool in zip((mine.keys, mine.values), mine.scales, (wide.keys, wide.values), strict=True):
        expected = quantize_kv(pool)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scales, expected[1])
    run, taken = make(name, overrides, kv="int8")
    assert all(taken)
    reference = generic(monkeypatch, name, overrides, "nf4", "bf16", BLOCKS, None, STREAM_FROM_TOKENS, False, "int8")
    wanted = make(name, overrides, "nf4", "fp32")[0]
    errors = []
    for start, stop in parts:
        found, own, right = (stage.feed({0: ids[start:stop]})[0].double() for stage in (run, reference, wanted))
        errors.append([((result - right).norm() / right.norm()).item() for result in (found, own)])
    fused_error, own_error = torch.tensor(errors).mean(0).tolist()
    assert fused_error < 0.06
    assert fused_error < 1.25 * own_error


def test_int8_rows_go_out_and_come_back() -> None:
    run, _ = make("qwen2", MODELS["qwen2"], kv="int8")
    run.feed({0: tokens(10)})
    tables = {"full": list(range(3))}
    rows = run.stage.export(tables, 0, 10)
    assert rows.shape == (10, LAYERS * 2 * 2 * (16 + 4)) == (10, run.stage.kv_width)
    assert run.stage.kv_bytes == 3 * BLOCKS * BLOCK_TOKENS * run.stage.kv_width
    other, _ = make("qwen2", MODELS["qwen2"], kv="int8")
    other.stage.restore(tables, 0, rows)
    other.lengths[0] = 10
    assert torch.equal(other.feed({0: [7]})[0], run.feed({0: [7]})[0])
    with pytest.raises(ValueError, match="is not what the stage keeps"):
        other.stage.restore(tables, 0, rows.bfloat16())


@pytest.mark.parametrize("name", ["qwen2", "granite", "mistral"])
def test_all_layers_in_one_call_are_the_layers_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a range is cut, or a layer of it is run alone, changes no bit."""
    ids, other = tokens(12), tokens(12, 4)
    run, _ = make(name, MODELS[name])
    with monkeypatch.context() as patch:
        patch.setattr(CutModel, "shorten", lambda self, layers: None)
        apart, taken = make(name, MODELS[name])
    assert all(taken)
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        rows = {0: ids[start:stop], 1: other[start:stop]}
        together, alone = run.feed(rows), apart.feed(rows)
        assert all(torch.equal(together[row], alone[row]) for row in rows)


@pytest.mark.parametrize(("dtype", "taken"), [("bf16", True), ("fp32", False)])
def test_the_norm_before_the_head_is_the_kernels(dtype: str, taken: bool) -> None:
    run, _ = make("qwen2", MODELS["qwen2"], "nf4", dtype, head=True)
    assert isinstance(run.stage.model.skeleton.base.norm.forward, fused._Norm) is taken


@pytest.mark.parametrize("name", [*MODELS, "dynamic"])
def test_the_short_way_of_decoding_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a token a row, past a window and block borders; it is not taken where angles depend on the length."""
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
    kind, overrides = ("llama", rope) if name == "dynamic" else (name, MODELS[name])
    taken = []
    hidden = Decoding.hidden
    monkeypatch.setattr(Decoding, "hidden", lambda *arguments: (taken.append(1), hidden(*arguments))[1])
    short, _ = make(kind, overrides)
    long, _ = make(kind, overrides)
    assert isinstance(long.stage, GenericStage)
    long.stage._decoding = None
    for run in (short, long):
        run.feed({0: tokens(9), 1: tokens(3, 5)})
    assert not taken
    for place in range(12):
        rows = {0: tokens(1, place), 1: tokens(1, 50 + place)}
        found, wanted = short.feed(rows), long.feed(rows)
        assert all(torch.equal(found[row], wanted[row]) for row in rows)
    assert len(taken) == (0 if name == "dynamic" else 12)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_was_prepared_has_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was prepared is used: angles and histories are not looked up again. Another step may come instead."""
    made: list[int] = []
    inputs = Decoding._inputs
    monkeypatch.setattr(Decoding, "_inputs", lambda *arguments: (made.append(1), inputs(*arguments))[1])
    ready, plain = (make(name, MODELS[name])[0] for _ in range(2))
    for run in (ready, plain):
        run.feed({0: tokens(9), 1: tokens(3, 5)})
        run.feed({0: [1], 1: [2]})  # the table of angles is made
        assert isinstance(run.stage, GenericStage)
        run.stage.prepare(step_of(run, {0: [1]}))  # it never comes
    for place in range(12):
        rows = {0: tokens(1, place), 1: tokens(1, 50 + place)}
        made.clear()
        found = ready.feed(rows, prepare=True)
        assert len(made) == 2  # for two that were expected, and none when one came
        wanted = plain.feed(rows)
        assert all(torch.equal(found[row], wanted[row]) for row in rows)


def test_a_history_of_several_segments() -> None:
    """Longer than what one task of the attention reads: alone and beside a short row, one thread and three."""
    config = {"max_position_embeddings": 4096}
    found = []
    for threads, beside in ((1, False), (3, True)):
        torch.set_num_threads(threads)
        run, _ = make("qwen2", config, blocks=300)
        for index in range(72):
            run.feed({0: tokens(16, seed=index)})
        rows = {1: tokens(2), 0: tokens(3)} if beside else {0: tokens(3)}
        found.append(run.feed(rows)[0])
    assert torch.equal(*found)


def test_more_tokens_than_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of seven tokens: two calls, and the bits of three."""
    ids = [tokens(7, seed) for seed in (1, 2, 3)]
    together, _ = make("qwen2", {})
    found = together.feed(dict(enumerate(ids)))
    for row, own in enumerate(ids):
        alone, _ = make("qwen2", {})
        assert torch.equal(alone.feed({row: own})[row], found[row])


@pytest.mark.parametrize("kind", [many.TORCH, "bf16"])
def test_a_chunk_of_a_prompt_is_alone_in_its_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of many rows may round by how many there are: a chunk's are its own, whoever is in the step."""
    monkeypatch.setenv(PROMPT_VARIABLE, kind)
    ids = [tokens(33, seed) for seed in (1, 2, 3)]
    together, _ = make("qwen2", {})
    shapes = shapes_of(together, monkeypatch)
    found = together.feed(dict(enumerate(ids)))
    assert shapes == [(1, 33)] * 3
    for row, own in enumerate(ids):
        alone, _ = make("qwen2", {})
        assert torch.equal(alone.feed({row: own})[row], found[row])


def shapes_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows and new tokens of each batch that the model is given from now on."""
    forward, shapes = run.stage.model.forward, list[tuple[int, ...]]()

    def noted(ids: Tensor, *others: Any) -> Tensor:
        shapes.append(tuple(ids.shape))
        return forward(ids, *others)

    monkeypatch.setattr(run.stage.model, "forward", noted)
    return shapes


@pytest.mark.parametrize("format", ["nf4", "bf16"])
def test_tokens_computed_again_go_in_groups_where_that_changes_no_bit(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = make("qwen2", {}, format)[0], make("qwen2", {}, format)[0]
    ids, other = tokens(20), tokens(20, 4)
    for place in range(20):
        first.feed({0: ids[place : place + 1], 1: other[place : place + 1]})
    shapes = shapes_of(again, monkeypatch)
    for part in (slice(0, 16), slice(16, 20)):
        again.feed({0: ids[part], 1: other[part]}, replay=True)
    assert shapes == [(2, 16), (2, 4)]
    for index, store in first.stage._stores.items():
        assert torch.equal(store.keys, again.stage._stores[index].keys)
        assert torch.equal(store.values, again.stage._stores[index].values)
    singly = generic(monkeypatch, "qwen2", {}, format)
    shapes = shapes_of(singly, monkeypatch)
    singly.feed({0: ids[:3]}, replay=True)
    assert shapes == [(1, 1)] * 3


@pytest.mark.parametrize("level", list(LEVELS))
def test_every_level_gives_the_same_bits(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for name in (level, "portable"):
        monkeypatch.setattr(fused, "kernel", lambda name=name: LEVELS[name])
        run, taken = make("qwen3", {})
        assert all(taken)
        results.append(torch.cat([run.feed({0: [token]})[0] for token in tokens(9)]))
    assert torch.equal(*results)


def test_what_is_not_finite_stays_visible() -> None:
    run, _ = make("llama", {})
    ids = tokens(8)
    run.feed({0: ids[:4], 1: ids[:4]})
    run.stage._stores[0].keys[1, :, 2] = torch.nan  # in the second block of sequence 0, not yet written
    run.feed({0: ids[4:6], 1: ids[4:6]})
    run.stage._stores[0].keys[1, :, 0] = torch.nan
    found = run.feed({0: ids[6:7], 1: ids[6:7]})
    assert found[0].isnan().any()
    assert found[1].isfinite().all()


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_keep_their_own_code(name: str) -> None:
    _, taken = make(name, OTHERS[name])
    assert not any(taken)


def test_float32_and_dense_weights_keep_their_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(make("llama", {}, "nf4", "fp32")[1])
    monkeypatch.setattr("splitrun.kernels.formats.kernel", lambda: None)
    assert not any(make("llama", {})[1])
