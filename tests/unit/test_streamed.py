"""Prompts of layers on the processor, computed on a card (interpreted where there is none), against float32."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from test_fused import LEVELS, MODELS, Run, make, tokens

from splitrun.stage.stream_card import SMALL_BYTES, StreamCard, pages_of, without
from splitrun.stage.streamed import StreamedLayers

pytestmark = pytest.mark.skipif(not LEVELS, reason="nothing is compiled here")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLABS_BYTES = 1 << 20
SIZES = {"head_dim": 32, "hidden_size": 192}
CASES = [("qwen3", "nf4"), ("mistral", "int8"), ("llama", "fp16")]
if DEVICE.type == "cpu":  # interpreted kernels take their time
    CASES = CASES[:2]
LEAST_TOKENS = 33
CHUNKS = (35, 33, 20, 1)
"""New tokens of each step: two chunks for the card, the second behind a history that ends within a block, and one that
is shorter than those for the card."""


def streamed(name: str, format: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Run]:
    """A stage whose prompts go to the card, counting their tokens in ``calls``, and one in float32."""
    run = StreamedLayers.run

    def counted(self: StreamedLayers, hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        calls.append(hidden.shape[0])
        return run(self, hidden, *others)

    monkeypatch.setattr(StreamedLayers, "run", counted)
    card = StreamCard(DEVICE, SLABS_BYTES)
    overrides = MODELS[name] | SIZES | ({"sliding_window": 40} if name == "mistral" else {})
    ours, taken = make(name, overrides, format, "fp16", 24, card, LEAST_TOKENS)
    assert all(taken)
    return ours, make(name, overrides, format, "fp32", 24)[0]


@pytest.mark.parametrize(("name", "format"), CASES)
def test_chunks_on_the_card_and_tokens_on_the_processor_follow_float32(
    name: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    ours, wanted = streamed(name, format, calls, monkeypatch)
    ids, done = tokens(sum(CHUNKS)), 0
    for count in CHUNKS:
        rows = {0: ids[done : done + count]}
        found, exact = ours.feed(rows)[0].double(), wanted.feed(rows)[0].double()
        error = (found - exact).norm() / exact.norm()
        assert error < (0.05 if count < LEAST_TOKENS else 0.005), f"{count} tokens: {error:.4f}"
        done += count
    assert calls == [35, 33]


def test_a_layer_that_exceeds_the_slabs_stays_on_the_processor(caplog: pytest.LogCaptureFixture) -> None:
    run, taken = make("qwen3", SIZES, "nf4", "fp16", 16, StreamCard(DEVICE, 4096))
    assert all(taken)
    assert "prompts stay on the processor" in caplog.text
    assert run.feed({0: tokens(LEAST_TOKENS)})[0].isfinite().all()


def test_pages_that_tensors_share_are_pinned_once() -> None:
    whole = torch.empty(5 * 4096 + 64, dtype=torch.uint8)
    base = -whole.data_ptr() % 4096
    parts = [whole[base + first : base + last] for first, last in ((10, 5000), (5000, 9000), (12288, 12289))]
    start = whole.data_ptr() + base
    assert list(pages_of(parts)) == [(start, start + 4 * 4096)]
    assert list(pages_of(parts[1:])) == [(start + 4096, start + 4 * 4096)]
    assert list(pages_of([parts[0], whole[base + 16384 : base + 16390]])) == [
        (start, start + 2 * 4096),
        (start + 4 * 4096, start + 5 * 4096),
    ]


def test_pages_of_neighbours_are_left_out() -> None:
    assert list(without([(0, 10), (20, 30)], [(8, 12), (22, 24)])) == [(0, 8), (20, 22), (24, 30)]
    assert list(without([(2, 5)], [(0, 9)])) == []
    assert list(without([(2, 5)], [])) == [(2, 5)]


def test_a_tensor_over_two_pinned_ranges_is_copied() -> None:
    """One copy over two registrations is refused by the driver."""
    card = StreamCard(torch.device("cpu"), SLABS_BYTES)
    memory = torch.empty(4 * SMALL_BYTES, dtype=torch.uint8)
    start = memory.data_ptr()
    parts = [memory[: 2 * SMALL_BYTES], memory[SMALL_BYTES : 3 * SMALL_BYTES], memory[3 * SMALL_BYTES :], memory[:16]]
    assert [card._copies_whole(part) for part in parts] == [True, True, True, False]
    card._pinned = [(start, start + 2 * SMALL_BYTES), (start + 2 * SMALL_BYTES, start + 3 * SMALL_BYTES)]
    assert [card._copies_whole(part) for part in parts] == [True, False, True, True]
    card._pinned.clear()
    card.close()
