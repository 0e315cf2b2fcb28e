"""Layers that look back on a window: timed no further than it, and foretold to take no more beyond."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from planner_models import GIB, device
from tiny_models import COMMON
from transformers import Gemma2Config, MistralConfig

from splitrun.measure.cache import Cache
from splitrun.measure.profile import profile
from splitrun.measure.timing import Sample, Setting
from splitrun.measure.unit_seconds import Wanted, measure
from splitrun.measure.unit_steps import Point
from splitrun.model.cut import CutRange
from splitrun.model.files import ModelFiles
from splitrun.model.structure import ModelStructure, inspect
from splitrun.planner.cost import decode_s, prefill_s, stage_overhead_s
from splitrun.planner.facts import Cluster, Workload

WINDOW = 200
CPU = device(budget=8 * GIB)
TIMED: list[Point] = []


class Watch:
    """A clock's stand-in: 1 ms a stage (``embed_s`` one that only embeds), and of each layer 1 us for each token that a
    token looks back on."""

    load_bytes, chunk_step, fast = 0, 1, None
    embed_s = 1e-3

    def __init__(
        self, config: Any, structure: ModelStructure, cut: CutRange, setting: Setting, points: Sequence[Point]
    ) -> None:
        groups = (structure.caches[index].group for index in range(cut.start, cut.stop))
        self._stage_s = self.embed_s if cut.embed else 1e-3
        self._windows = [group.window or 1 << 30 for group in groups if group is not None]

    def time(self, points: Sequence[Point]) -> dict[Point, Sample]:
        if WINDOW in self._windows:
            TIMED.extend(points)
        return {point: Sample(self._stage_s + sum(self._layer_s(point, window) for window in self._windows), 0.0)
                for point in points}  # fmt: skip

    def close(self) -> None:
        pass

    @staticmethod
    def _layer_s(point: Point, window: int) -> float:
        return 1e-6 * point.rows * point.tokens * min(point.context, window)


@pytest.mark.parametrize(("history", "sliding", "full"), [(100, 100, 100), (2000, WINDOW, 2000), (9000, WINDOW, 9000)])
@pytest.mark.parametrize("kind", [Gemma2Config, MistralConfig])  # windows in every other layer, and in each
def test_a_window_caps_what_was_measured(kind: Any, history: int, sliding: int, full: int, tmp_path: Path) -> None:
    TIMED.clear()
    Watch.embed_s = 1e-3 if kind is Gemma2Config else 0.6e-3  # seen as the stage's own on layers in a row alone
    config = kind(**{**COMMON, "num_hidden_layers": 4, "sliding_window": WINDOW, "max_position_embeddings": 16384})
    files, structure = ModelFiles("tiny", None, tmp_path, config, weights=False), inspect(config)
    files.__dict__["fingerprint"] = "sha256:0"
    facts = profile(files, structure)
    bench: Any = Watch
    facts = measure(files, structure, facts, Cluster((CPU,)), Wanted({"cpu": ("bf16",)}, (1, 4)), Cache(tmp_path),
                    open_bench=bench)  # fmt: skip
    workload = Workload(context=16384, history_tokens=history, prompt_tokens=512 + history // 512 * 512)
    for rows in (1, 4):
        seconds = [decode_s(facts, unit, CPU, "bf16", workload, "bf16", rows) for unit in (1, 2)]
        second = full if kind is Gemma2Config else sliding
        assert seconds == pytest.approx([rows * sliding * 1e-6, rows * second * 1e-6], rel=1e-6)
        own_s = stage_overhead_s(facts, CPU, "bf16", workload, False, rows)
        assert own_s == pytest.approx(1e-3, rel=1e-6)  # however long the history
    starts = range(0, 512 + history // 512 * 512, 512)
    prompts = [prefill_s(facts, unit, CPU, "bf16", workload, "bf16") for unit in (1, 2)]
    expected = [
        sum(512e-6 * min(start, most) for start in starts)
        for most in (WINDOW, 1 << 30 if kind is Gemma2Config else WINDOW)
    ]
    assert prompts == pytest.approx(expected, rel=1e-6)
    assert max(point.context for point in TIMED) == WINDOW
