"""What is advised when a device runs full although the plan fits it: options with values, which plan for less."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitrun.planner.facts import Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec
from splitrun.planner.relief import relief

STAGES = (StageSpec("cpu", True, (0, 3), False, "nf4"), StageSpec("cuda:0", False, (3, 8), True, "bf16"))
PLAN = Placement(1, ModelRef("some/model", layers=8), Workload(4096, 4), STAGES, {"cpu": 8 << 30, "cuda:0": 4 << 30})


@pytest.mark.parametrize(
    ("plan", "device", "words"),
    [
        (
            PLAN,
            "cuda:0",
            "--context 2048 (now 4096), --sessions 2 (now 4), --weights nf4, or "
            "--memory cpu=8192MiB,cuda:0=3686MiB, a tenth less of cuda:0",
        ),
        (replace(PLAN, workload=Workload(1000), devices={}), "cpu", "--context 448 (now 1000)"),
        (
            replace(PLAN, workload=Workload(64), devices={}),
            "cpu",
            "less on cpu: a smaller model, or fewer layers there",
        ),
    ],
)
def test_what_is_advised(plan: Placement, device: str, words: str) -> None:
    assert relief(plan, device) == words
