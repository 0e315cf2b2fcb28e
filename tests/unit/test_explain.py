"""What a person reads."""

from __future__ import annotations

import re
from dataclasses import replace

from planner_models import GIB, MIB, device, model

from splitrun.planner.explain import explain
from splitrun.planner.facts import Cluster, Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec
from splitrun.planner.solve import solve

PROFILE = model(layers=8, values=100 * MIB)
CLUSTER = Cluster((device(), device("cuda:0", budget=GIB, bandwidth=300e9), device("cpu:1", bandwidth=1e9)))


def test_a_solved_plan() -> None:
    plan = solve(PROFILE, CLUSTER, Workload(sessions=2), "bf16")
    text = plan.explain()
    first = text.splitlines()[0]
    assert first == "some/model · 8 layers · 2 sessions of 4,096 tokens · planned for latency"
    assert re.search(r"^ +0  +cpu  +embed.* +bf16 +[\d.]+ [GM]iB ", text, re.M)
    for device_name, total in (("cpu", "8.00 GiB"), ("cuda:0", "1.00 GiB")):
        assert re.search(rf"^  {device_name} +[█▓▒░:·-]{{40}}  [\d.]+ [GM]iB of {total}$", text, re.M)
    assert re.search(r"^Predicted   [\d.]+ tok/s decoding", text, re.M)
    assert "first token of a 512-token prompt after " in text
    assert "for all 2 sessions together" in text
    assert re.search(
        r"^Limited by  memory of cuda:0: .* more there would give [\d.]+ instead of [\d.]+ tok/s$", text, re.M
    )
    assert re.search(r"^Note        cpu:1 was left out; the best plan with it: ", text, re.M)


def test_the_bar_shows_each_item_in_proportion() -> None:
    plan = solve(PROFILE, Cluster((device(),)), Workload(), "bf16")
    assert plan.estimate is not None
    bill = plan.estimate.devices[0]
    (bar,) = re.findall(r"[█▓▒░:·-]{40}", plan.explain())
    assert abs(bar.count("█") - 40 * bill.weight_bytes / bill.budget_bytes) <= 1
    assert abs(bar.count("·") - 40 * (1 - bill.total_bytes / bill.budget_bytes)) <= 1


def test_a_hand_written_plan_is_estimated_with_facts_only() -> None:
    stages = (StageSpec("cpu", True, (0, 2), False, "nf4"), StageSpec("cuda:0", False, (2, 8), True, "fp32"))
    plan = Placement(1, ModelRef("mine"), Workload(), stages)
    bare = plan.explain()
    assert "embed + layers 0–1" in bare
    assert "No estimate is stored. For one: splitrun plan mine" in bare
    text = explain(plan, PROFILE, CLUSTER)
    assert re.search(r"^  cuda:0 .* of 1\.00 GiB: [\d.]+ GiB TOO MUCH$", text, re.M)
    assert "Predicted" in text


def test_fresh_facts_replace_stored_figures_but_keep_the_reasons() -> None:
    plan = solve(PROFILE, Cluster((device(), device("cpu:1", bandwidth=1e9))), Workload(), "bf16")
    faster = Cluster((device(bandwidth=280e9),))
    assert plan.estimate is not None
    again = explain(plan, PROFILE, faster)
    assert again != plan.explain()
    assert plan.estimate.notes[0] in again


def test_every_line_fits_a_terminal_but_the_reasons() -> None:
    text = solve(PROFILE, CLUSTER, Workload(), "bf16").explain()
    for line in text.splitlines():
        assert len(line) <= 110 or line.startswith(("Limited by", "Note")), line


def test_no_estimate_no_crash_without_devices() -> None:
    plan = solve(PROFILE, CLUSTER, Workload(), "bf16")
    assert "No estimate is stored" in replace(plan, estimate=None).explain()
