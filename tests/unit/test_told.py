"""Predicted beside measured after serving, and the table of a guide."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
from planner_models import device, model

from splitrun.bench import contest
from splitrun.bench.terms import Result
from splitrun.bench.told import Told, formats_of, to_text, told_table
from splitrun.engine.interface import EngineStatus, StageStatus
from splitrun.engine.record import StageClock
from splitrun.engine.told import predicted_and_measured
from splitrun.errors import DoesNotFit
from splitrun.planner.facts import Cluster, Workload
from splitrun.planner.placement import Placement
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


def test_every_row_is_planned_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def plan_in(process: object, model: str, options: dict[str, object]) -> Placement:
        asked.append(options)
        if options["weights"] == "int8":
            raise DoesNotFit("too small", {})
        return replace(PLAN, model=replace(PLAN.model, source="demo"))

    result = Result("splitrun", 1, 1, decode_tokens_per_s=12.5, peak_bytes={"cpu": 1 << 30})
    monkeypatch.setattr("splitrun.measure.probe.probe", lambda memory: Cluster((device(),)))
    monkeypatch.setattr(contest, "other_process", nullcontext)
    monkeypatch.setattr(contest, "plan_in", plan_in)
    monkeypatch.setattr(contest, "hold", lambda terms, others: [result])
    told: list[str] = []
    rows = told_table("demo", "weights", {"cpu": "2GiB"}, 16, 1, told.append)
    assert [(row.input_tokens, row.error) for row in rows] == [(1024, ""), (1024, ""), (512, "too small"), (256, "")]
    assert [options["weights"] for options in asked] == ["bf16", "nf4", "int8", "auto"]
    assert [options["context"] for options in asked] == [1040, 1040, 528, 272]
    assert asked[-1]["memory"] == {"cpu": "2GiB"}
    assert told[:2] == ["planning and running 1024 tokens, 16 bits", "| cpu | 1024 | bf16 | 1.00 GiB | 12.5 |"]
    assert told[5] == "| cpu | 512 | int8 | too small | – |"
