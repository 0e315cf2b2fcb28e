"""Chunks of prompts through a layer in one call, at every level of this processor that has a kernel for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_fused import LEVELS, MODELS, make, tokens

from splitrun.kernels.cpu import many
from splitrun.kernels.cpu.settings import LEVEL_VARIABLE, PROMPT_VARIABLE
from splitrun.stage.known import VARIANTS

pytestmark = [
    pytest.mark.skipif(not LEVELS, reason="nothing is compiled here"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def prompts(level: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Prompts as at that level, in that arithmetic. Skips the test where chunks have no kernel then."""
    monkeypatch.setenv(PROMPT_VARIABLE, kind)
    monkeypatch.setenv(LEVEL_VARIABLE, level)
    monkeypatch.setattr(many, "kernel", lambda: LEVELS[level])
    caches = (many._chosen, many._first_right)
    for cached in caches:
        cached.cache_clear()
    try:
        if many.many_rows() is None or many.attention_rows() is None:
            pytest.skip("no kernel for chunks at this level")
        yield
    finally:
        for cached in caches:
            cached.cache_clear()


@pytest.mark.usefixtures("prompts")
@pytest.mark.parametrize("level", list(LEVELS))
@pytest.mark.parametrize("name", [name for name in MODELS if name not in VARIANTS])
@pytest.mark.parametrize(
    ("kind", "format", "most"), [("bf16", "nf4", 0.02), ("bf16", "int8", 0.02), ("int8", "nf4", 0.06)]
)
def test_chunks_of_prompts_as_the_layers_own_code(
    name: str, format: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks behind a history, across blocks and windows, beside each other: near the exact products, and the same for
    any company and any threads."""
    called: list[int] = []
    right = many.ManyRows.chunk

    def counted(self: many.ManyRows, *arguments: Any) -> None:
        called.append(arguments[3].shape[0])
        right(self, *arguments)

    monkeypatch.setattr(many.ManyRows, "chunk", counted)
    run, exact = make(name, MODELS[name], format)[0], make(name, MODELS[name], format, "fp32")[0]
    ids, other = tokens(58), tokens(17, seed=4)
    found = [run.feed({0: ids[:19]})[0]]
    together = run.feed({0: ids[19:36], 1: other})
    torch.set_num_threads(3)
    found += [together[0], run.feed({0: ids[36:]})[0]]
    wanted = torch.cat([exact.feed({0: ids[:19]})[0], exact.feed({0: ids[19:]})[0]]).double()
    assert called == [19, 19, 17, 17, 17, 17, 22, 22]
    assert ((torch.cat(found).double() - wanted).norm() / wanted.norm()).item() < most
    alone = make(name, MODELS[name], format)[0]
    assert torch.equal(alone.feed({1: other})[1], together[1])


@pytest.mark.usefixtures("prompts")
@pytest.mark.parametrize("level", list(LEVELS))
@pytest.mark.parametrize(("kind", "most"), [("bf16", 0.02), ("int8", 0.06)])
def test_a_long_chunk_goes_in_blocks_of_rows(most: float) -> None:
    """More rows than one task of a product takes, in a layer of several panels and slabs: the same for any threads."""
    sizes = {"intermediate_size": 1088, "max_position_embeddings": 1024}
    ids, found = tokens(530), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(make("qwen2", sizes, blocks=140)[0].feed({0: ids})[0])
        assert torch.equal(found[0], found[-1])
    exact = make("qwen2", sizes, "nf4", "fp32", blocks=140)[0].feed({0: ids})[0]
    assert ((found[0].double() - exact.double()).norm() / exact.double().norm()).item() < most


@pytest.mark.usefixtures("prompts")
@pytest.mark.parametrize("level", list(LEVELS))
@pytest.mark.parametrize("kind", ["bf16"])
def test_heads_wider_than_a_slab_of_fp32() -> None:
    sizes = {"head_dim": 320, "num_attention_heads": 2, "num_key_value_heads": 1}
    run, taken = make("qwen2", sizes)
    assert all(taken)
    found, exact = (each.feed({0: tokens(50)})[0].double() for each in (run, make("qwen2", sizes, dtype="fp32")[0]))
    assert ((found - exact).norm() / exact.norm()).item() < 0.02
