"""Predicted beside measured after serving, and the table of a guide."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_models import device, model

from splitrun.bench.told import Told, formats_of, to_text
from splitrun.engine.interface import EngineStatus, StageStatus
from splitrun.engine.pipeline import StageClock
from splitrun.engine.told import predicted_and_measured
from splitrun.planner.facts import Cluster, Workload
from splitrun.planner.solve import solve

PLAN = solve(model(layers=2), Cluster((device(),)), Workload(), "bf16")


def status(milliseconds: float, steps: int) -> EngineStatus:
    return EngineStatus(True, stages=(StageStatus("cpu", "all", single_step_ms=milliseconds, single_steps=steps),))


def test_a_run_is_compared_with_its_plan() -> None:
    assert PLAN.estimate is not None
    took = PLAN.estimate.stages[0].decode_s * 1e3
    assert "(+0%)" in predicted_and_measured(PLAN, status(took, 20))
    assert "(-50%)" in predicted_and_measured(PLAN, status(2 * took, 20))
    assert "measured over 20 tokens" in predicted_and_measured(PLAN, status(took, 20))
    assert predicted_and_measured(PLAN, status(took, 3)) == ""
    assert predicted_and_measured(replace(PLAN, estimate=None), status(took, 20)) == ""


def test_the_clock_keeps_single_tokens_apart() -> None:
    clock = StageClock()
    clock.add(2.0, 512)
    clock.add(0.5, 1)
    clock.add(0.25, 1)
    assert (clock.total_s, clock.steps) == (pytest.approx(2.75), 3)
    assert (clock.single_s, clock.single_steps) == (pytest.approx(0.75), 2)


def test_the_guides_columns() -> None:
    rows = [Told("a card", 1024, "nf4", 1536 << 20, 93.2), Told("a card", 512, "int8", error="does not fit")]
    head, _, first, second = to_text(rows).splitlines()
    assert head == "| hardware | input | weights | device memory | tok/s |"
    assert first == "| a card | 1024 | nf4 | 1.50 GiB | 93.2 |"
    assert second == "| a card | 512 | int8 | does not fit | – |"
    assert formats_of(PLAN) == "bf16"
