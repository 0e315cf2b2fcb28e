"""Embedding and head are timed as they run in earnest: behind others that have emptied the processor's inner caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tiny_models import COMMON
from transformers import LlamaConfig

from splitrun.measure import timing
from splitrun.measure.timing import BETWEEN_BYTES, Sample, Setting, UnitBench, sample
from splitrun.measure.unit_steps import Point
from splitrun.model.cut import CutRange
from splitrun.model.structure import inspect

POINT = Point(1, 1, 4)
CONFIG = LlamaConfig(**COMMON)
STRUCTURE = inspect(CONFIG)
N = STRUCTURE.layers


def test_what_comes_before_a_run_comes_before_each() -> None:
    done: list[str] = []
    sample(done.append, ["run"], 0.0, before=lambda: done.append("before"))
    assert len(done) >= 2 * timing.FEWEST_RUNS
    assert done == ["before", "run"] * (len(done) // 2)


@pytest.mark.parametrize(
    ("cut", "reads"),
    [
        (CutRange(True, 0, 0, False), True),
        (CutRange(False, N, N, True), True),
        (CutRange(False, 0, 1, False), False),  # whose weights lie in enough copies
    ],
    ids=["embed", "head", "layer"],
)
def test_memory_is_read_between_two_runs_of_an_end(cut: CutRange, reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def note(
        run: Callable[[Any], None], subjects: Sequence[Any], spend_s: float, before: Callable[[], Any] | None = None
    ) -> Sample:
        read.append(0 if before is None else int(before()) * 4)
        return Sample(1.0, 0.0)

    monkeypatch.setattr(timing, "sample", note)
    bench = UnitBench(CONFIG, STRUCTURE, cut, Setting("cpu", "cpu", "bf16", "bf16", 16), [POINT])
    bench.time([POINT], peaks=False)
    bench.close()
    assert read == [BETWEEN_BYTES if reads else 0]
