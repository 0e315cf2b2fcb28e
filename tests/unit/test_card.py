"""The GPU kernels and the stage made of them against the generic one: on a GPU, or interpreted where there is none."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from splitrun.kernels.formats import DTYPES
from splitrun.kernels.gpu import attention, products
from splitrun.kernels.gpu.slots import SLOTS
from splitrun.kernels.int8 import Int8Weight
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.weight import Weight, install
from splitrun.model.cut import CutModel, CutRange
from splitrun.model.structure import ModelStructure, inspect
from splitrun.schedule.request import SamplingParams
from splitrun.schedule.step import RowSampling, Step, Tokens
from splitrun.stage import load
from splitrun.stage.card import CardStage, card_stage
from splitrun.stage.card_inputs import DecodeSlots
from splitrun.stage.generic import Computed, RangeStage
from splitrun.stage.load import StageSize, load_stage

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_TOKENS, BLOCKS, LAYERS = 8, 12, 2
SIZES = {
    **{"hidden_size": 192, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 32, "vocab_size": 80, "max_position_embeddings": 256, "intermediate_size": 128},
}
if DEVICE == "cuda":  # as wide as the compiled products of every format want it, and no round number of their pieces
    SIZES |= {"hidden_size": 320, "head_dim": 64, "intermediate_size": 576}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": 20},
}
FORMATS = ("dense", "int8", "nf4")
CASES = [(name, format) for name in MODELS for format in FORMATS]
if DEVICE == "cpu":  # interpreted kernels take their time
    CASES = [("qwen3", "nf4"), ("mistral", "dense")]
on_a_card = pytest.mark.skipif(DEVICE == "cpu", reason="interpreted kernels take their time")
TYPE = "bf16" if DEVICE == "cuda" else "fp16"
"""The interpreter does not compute in bf16."""


def weights_of(structure: ModelStructure, format: str, dtype: torch.dtype) -> dict[str, Weight | Tensor]:
    """Random weights by name; what a format covers is in it."""
    generator = torch.Generator().manual_seed(11)
    found: dict[str, Weight | Tensor] = {}
    for info in structure.parameters:
        noise = torch.randn(info.shape, generator=generator)
        if len(info.shape) < 2:
            found[info.name] = (1 + 0.3 * noise).to(dtype).to(DEVICE)
            continue
        values = (noise * (1.0 if info.unit == 0 else 1.5 / info.shape[-1] ** 0.5)).to(DEVICE)
        if format == "dense":
            found[info.name] = values.to(dtype)
            continue
        kind = Nf4Weight if format == "nf4" else Int8Weight
        weight = kind.empty(info.shape, dtype, DEVICE)
        weight.store(0, values)
        found[info.name] = weight
    for info in structure.parameters:
        if info.tied_to:
            found[info.name] = found[info.tied_to]
    return found


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "PARTS", 4)
        monkeypatch.setattr(products, "product_shape", lambda *sizes: products.Shape(64, turn=64, span=128))


@dataclass
class Run:
    """A stage with the histories of its sequences."""

    stage: RangeStage
    structure: ModelStructure
    lengths: dict[int, int] = field(default_factory=dict)
    index: int = 0

    def feed(
        self,
        rows: dict[int, Sequence[int]],
        incoming: Tensor | None = None,
        scored: bool = False,
        expected: Sequence[str] = (),
    ) -> Any:
        """Run tokens of some sequences as one step. ``expected``: what the stage makes ready for before: this step,
        another one in its place, or the next."""
        counts = [len(ids) for ids in rows.values()]
        tables = numpy.array([[row * BLOCKS + block for block in range(BLOCKS)] for row in rows], dtype=numpy.int32)
        greedy = SamplingParams(max_tokens=1, temperature=0.0)
        step = Step(
            index=self.index,
            epoch=0,
            token_ids=numpy.array([token for ids in rows.values() for token in ids], dtype=numpy.int32),
            query_starts=numpy.cumsum([0, *counts]).astype(numpy.int32),
            context_lengths=numpy.array([self.lengths.get(row, 0) for row in rows], dtype=numpy.int32),
            slots=numpy.array(list(rows), dtype=numpy.int32),
            block_tables={group.name: tables for group in self.structure.groups},
            sampling=tuple(RowSampling(greedy, 0, 0) for _ in rows),
            prompt_logprobs=(2 if scored else None,) * len(rows),
            prompt_targets={row: tuple(ids[1:]) for row, ids in enumerate(rows.values())} if scored else None,
            replay=(False,) * len(rows),
        )
        self.index += 1
        self.latest = step
        known = step.token_ids.copy()
        step.token_ids[:] = 0
        longer = replace(step, context_lengths=step.context_lengths + 1)
        for one in expected:
            assert isinstance(self.stage, CardStage)
            self.stage.prepare({"this": step, "other": longer, "next": replace(longer, index=step.index + 1)}[one])
        step.token_ids[:] = known
        whole = self.stage.model.cut.head
        computed = self.stage.compute(step, incoming) if whole else self.stage.run(step, incoming)
        for row, ids in rows.items():
            self.lengths[row] = self.lengths.get(row, 0) + len(ids)
        if isinstance(computed, Tensor):
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return computed.float().cpu()
        assert isinstance(computed, Computed)
        self.scores = computed.prompt_logprobs
        return {row: computed.logits[place].float().cpu() for place, row in enumerate(rows)}


def make(
    name: str, format: str, dtype: str, monkeypatch: pytest.MonkeyPatch, cut: CutRange | None = None, card: bool = True
) -> Run:
    """The stage of a range by the kernels, or the generic stage on the same values in float32."""
    config = AutoConfig.for_model(name, **SIZES, **MODELS[name])
    structure = inspect(config)
    weights = weights_of(structure, format, DTYPES[dtype])
    kind = dtype if card else "fp32"

    def fill(model: CutModel) -> int:
        for own in model.own_names:
            value = weights[own]
            values = value.dequantize() if isinstance(value, Weight) else value
            install(model.skeleton.model, own, value if card else values.float())
        return 0

    size = StageSize(DEVICE, kind, kind, {group.name: BLOCKS * 20 for group in structure.groups}, BLOCK_TOKENS, 20)
    with monkeypatch.context() as patch:
        patch.setattr(load, "usable", lambda device: card)
        stage = load_stage(config, structure, cut or CutRange(True, 0, LAYERS, True), size, fill)
    assert isinstance(stage, CardStage) == card
    return Run(stage, structure)


def tokens(count: int, seed: int = 3) -> list[int]:
    return torch.randint(1, 80, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(found: dict[int, Tensor], wanted: dict[int, Tensor], limit: float) -> None:
    for row, logits in wanted.items():
        error = (found[row] - logits).norm() / logits.norm()
        assert error < limit, f"row {row}: {error:.4f}"


@pytest.mark.parametrize(("name", "format"), CASES)
def test_prompts_chunks_and_decoding_follow_the_generic_stage(
    name: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, limit = ("fp16", 0.01) if format == "int8" else (TYPE, 0.04 if TYPE == "bf16" else 0.01)
    ours = make(name, format, dtype, monkeypatch)
    wanted = make(name, format, dtype, monkeypatch, card=False)
    first, second = (26, 27) if DEVICE == "cuda" else (11, 13)  # beyond a block, together beyond the window
    steps: list[dict[int, list[int]]] = [
        {0: tokens(first, 1), 1: tokens(5, 2)},
        {0: tokens(second, 3), 2: tokens(1, 4), 1: tokens(1, 5)},
        {1: tokens(1, 6), 0: tokens(1, 7), 2: tokens(1, 8)},
        {2: tokens(1, 9)},
    ]
    for rows in steps:
        close(ours.feed(rows), wanted.feed(rows), limit)


@on_a_card
def test_a_row_has_the_same_bits_alone_and_in_company(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = make("qwen3", "nf4", TYPE, monkeypatch)
    among = make("qwen3", "nf4", TYPE, monkeypatch)
    prompt = tokens(70)
    alone.feed({3: prompt})
    among.feed({3: prompt})
    rest = (0, 1, 2, 4, 5)
    among.feed({row: tokens(3 + 9 * row, row) for row in rest})
    for turn in range(2):
        others = {row: tokens(1, 20 + turn + row) for row in rest}
        assert torch.equal(alone.feed({3: [turn + 1]})[3], among.feed({**others, 3: [turn + 1]})[3])


@on_a_card
def test_a_cut_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make("qwen2", "nf4", TYPE, monkeypatch)
    parts = [
        make("qwen2", "nf4", TYPE, monkeypatch, CutRange(True, 0, 0, False)),
        make("qwen2", "nf4", TYPE, monkeypatch, CutRange(False, 0, 1, False)),
        make("qwen2", "nf4", TYPE, monkeypatch, CutRange(False, 1, LAYERS, True)),
    ]
    for rows in ({0: tokens(20), 1: tokens(3)}, {1: tokens(1), 0: tokens(1)}):
        activation: Any = None
        for part in parts:
            arriving = None if activation is None else activation.to(DTYPES[TYPE]).to(DEVICE)
            activation = part.feed(rows, arriving)
        wanted = whole.feed(rows)
        assert all(torch.equal(activation[row], wanted[row]) for row in rows)


@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_was_prepared_has_the_same_bits(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ids or an activation coming in; whether the step comes that was expected last, or another one."""
    cut = CutRange(first, 0, 1, False)
    ready, plain = (make("llama", "dense", TYPE, monkeypatch, cut) for _ in range(2))
    for run in (ready, plain):
        run.feed({0: [1], 1: [2]}, None if first else torch.ones((2, SIZES["hidden_size"]), dtype=DTYPES[TYPE]))
    for turn in range(SLOTS + 2):
        rows = {row: [turn + row + 3] for row in range(1 + turn % 2)}
        noise = torch.randn((len(rows), SIZES["hidden_size"]), generator=torch.Generator().manual_seed(turn))
        incoming = None if first else noise.to(DTYPES[TYPE])
        expected = (["this"], ["other"], ["other", "this", "next"], ["this", "other"])[turn % 4]
        found = ready.feed(rows, incoming, expected=expected)
        assert torch.equal(found, plain.feed(rows, incoming))


def test_a_slot_is_filled_once_for_a_step_that_was_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is expected while the one before it has come, or is still on its way."""
    filled: list[int] = []
    fill = DecodeSlots._fill
    monkeypatch.setattr(DecodeSlots, "_fill", lambda self, turn, *rest: (filled.append(turn), fill(self, turn, *rest)))
    hidden = torch.zeros((16, 4))
    slots = DecodeSlots(("full",), hidden, True, hidden)
    run = make("llama", "dense", TYPE, monkeypatch, CutRange(False, 0, 1, False))
    run.feed({0: [1]}, torch.zeros((1, SIZES["hidden_size"]), dtype=DTYPES[TYPE]))
    steps = [replace(run.latest, index=index, context_lengths=run.latest.context_lengths + index) for index in range(9)]
    filled.clear()
    slots.write(steps[0], range(1), torch.zeros((1, 4)), leaves=True)
    slots.launched(None)
    slots.prepare(steps[1])
    for step, behind in pairwise(steps[1:]):
        slots.prepare(behind)
        slots.prepare(replace(behind, index=behind.index + 1))  # too far ahead
        slots.write(step, range(1), torch.ones((1, 4)), leaves=True)
        assert slots._views[step.index % SLOTS].lengths[0] == step.context_lengths[0]
        slots.launched(None)
    assert filled == [index % SLOTS for index in range(9)]


def test_making_ready_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's loop would stand still behind a stage that captures, or hangs."""
    run = make("llama", "dense", TYPE, monkeypatch, CutRange(False, 0, 1, False))
    run.feed({0: [1]}, torch.zeros((1, SIZES["hidden_size"]), dtype=DTYPES[TYPE]))
    assert isinstance(run.stage, CardStage)
    asking = threading.Thread(target=run.stage.prepare, args=(run.latest,), daemon=True)
    with run.stage._graphs._filling:
        asking.start()
        asking.join(10.0)
        assert not asking.is_alive()


def test_what_is_left_for_the_processor_is_what_lies_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    given, kept = (make("llama", "dense", TYPE, monkeypatch, CutRange(False, 0, 1, False)) for _ in range(2))
    given.stage.gives_host = True
    hidden = SIZES["hidden_size"]
    for turn in range(SLOTS + 2):  # every slot, and some again
        rows = {row: [1] for row in range(1 + turn % 2)}
        noise = torch.randn((len(rows), hidden), generator=torch.Generator().manual_seed(turn)).to(DTYPES[TYPE])
        found = given.feed(rows, noise)
        assert torch.equal(found, kept.feed(rows, noise.to(DEVICE)))
        assert not torch.equal(found, noise.float())


def test_what_is_left_stays_while_later_steps_compute_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that were made before are computed one run each, more of them than there are places for what is left."""
    run = make("llama", "dense", TYPE, monkeypatch, CutRange(True, 0, 1, False))
    run.stage.gives_host = True
    run.feed({0: [5]})
    first = replace(run.latest, index=1, context_lengths=run.latest.context_lengths + 1)
    left = run.stage.run(first, None)
    assert isinstance(left, Tensor)
    run.stage._graphs._slots.wait()  # type: ignore[attr-defined]
    before = left.clone()
    count = SLOTS + 1
    again = replace(
        first,
        index=2,
        token_ids=numpy.arange(7, 7 + count, dtype=numpy.int32),
        query_starts=numpy.array([0, count], dtype=numpy.int32),
        context_lengths=numpy.array([0], dtype=numpy.int32),
        slots=numpy.array([1], dtype=numpy.int32),
        block_tables={name: table + BLOCKS for name, table in first.block_tables.items()},
        replay=(True,),
    )
    computed = run.stage.run(again, None)
    assert isinstance(computed, Tensor)
    assert computed.shape[0] == count
    run.stage._graphs._slots.wait()  # type: ignore[attr-defined]
    assert torch.equal(left, before)


class Full:
    """torch.zeros on a card that is full at the call of that number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
        self._zeros, self._left = torch.zeros, after
        monkeypatch.setattr(torch, "zeros", self)

    def __call__(self, *size: Any, **options: Any) -> Tensor:
        self._left -= 1
        if self._left == -1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._zeros(*size, **options)


def test_a_prompt_that_finds_the_card_full_leaves_the_memory_of_steps_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, other = (make("llama", "dense", TYPE, monkeypatch) for _ in range(2))
    for each in (run, other):
        each.feed({0: tokens(3, 1)})
    with monkeypatch.context() as patch:
        Full(patch)
        with pytest.raises(torch.OutOfMemoryError):
            run.feed({1: tokens(40, 2)})
    assert torch.equal(run.feed({1: tokens(40, 2)})[1], other.feed({1: tokens(40, 2)})[1])


@pytest.mark.parametrize("after", [0, 1])
def test_wider_tables_on_a_full_card_leave_the_former_ones(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.zeros((16, 4))
    slots = DecodeSlots(("full",), hidden, True, hidden)
    with monkeypatch.context() as patch:
        Full(patch, after)
        with pytest.raises(torch.OutOfMemoryError):
            slots.set_blocks(2 * slots.blocks)
    assert slots.history("full", 1).tables.shape == (1, slots.blocks)
    slots.set_blocks(2 * slots.blocks)
    assert slots.history("full", 1).tables.shape == (1, slots.blocks)


def test_scored_prompts_report_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, wanted = (make("llama", "dense", "fp16", monkeypatch, card=card) for card in (True, False))
    rows = {0: tokens(20)}
    ours.feed(rows, scored=True)
    wanted.feed(rows, scored=True)
    found, expected = ours.scores[0], wanted.scores[0]
    assert [entry.token_id for entry in found] == rows[0][1:]
    assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in expected], abs=0.03)


def test_greedy_rows_bring_back_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make("llama", "dense", TYPE, monkeypatch)
    run.feed({0: tokens(6), 1: tokens(3)})
    for rows in ({0: [5], 1: [6]}, {1: [9]}):
        logits = run.feed(rows)
        found = run.stage.run(run.latest, None)
        assert isinstance(found, Tokens)
        assert [row.token_ids for row in found.rows] == [(int(logits[row].argmax()),) for row in rows]


def test_models_that_the_kernels_do_not_compute_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in {"granite": {"residual_multiplier": 0.3}, "gemma2": {}, "olmo2": {}}.items():
        config = AutoConfig.for_model(name, **SIZES, **changes)
        structure = inspect(config)
        model = CutModel(config, structure, CutRange(True, 0, LAYERS, True), "bf16", DEVICE)
        assert card_stage(model, {}, rules=None, weight_bytes=0) is None, name  # type: ignore[arg-type]
