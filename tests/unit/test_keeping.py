"""What a plan keeps for stages that may be lost: in its bill, and the same when it is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_models import GIB, MIB, device, model

from splitrun.engine.loading import pool_sizes
from splitrun.engine.room import journals_fit, kept_room
from splitrun.model.files import resolve
from splitrun.model.structure import inspect
from splitrun.planner.cost import estimate
from splitrun.planner.explain import explain
from splitrun.planner.facts import Cluster, Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec

WORKLOAD = Workload(context=1024, sessions=2)
JOURNAL = 2 * 1024 * 1024 * 2  # sessions, context, hidden values, bytes
KV = 512 * 1024 * 2 * 2  # of one layer: values, tokens, sessions, bytes
PROFILE = model(layers=4, values=10 * MIB, kv=512)


def plan(budget: int) -> Placement:
    stages = (
        StageSpec("cpu", True, (0, 1), False, "bf16"),
        StageSpec("a/cpu", False, (1, 3), False, "bf16"),
        StageSpec("b/cpu", False, (3, 4), True, "bf16"),
    )
    made = Placement(1, ModelRef("m", layers=4), WORKLOAD, stages, {"cpu": budget, "a/cpu": GIB, "b/cpu": GIB})
    cluster = Cluster((device(), device("a/cpu"), device("b/cpu")))
    return replace(made, estimate=estimate(PROFILE, cluster, made))


def other_items(made: Placement) -> int:
    assert made.estimate is not None
    (bill,) = [bill for bill in made.estimate.devices if bill.device == "cpu"]
    return bill.total_bytes - bill.kept_bytes


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        (JOURNAL + 3 * KV, {"cpu": JOURNAL + 3 * KV, "a/cpu": JOURNAL, "b/cpu": 0}),
        (JOURNAL + 3 * KV - 1, {"cpu": JOURNAL + 2 * KV, "a/cpu": JOURNAL, "b/cpu": 0}),
        (JOURNAL + KV, {"cpu": JOURNAL + KV, "a/cpu": JOURNAL, "b/cpu": 0}),
        (JOURNAL - 1, {"cpu": KV, "a/cpu": 0, "b/cpu": 0}),
        (-1, {"cpu": 0, "a/cpu": 0, "b/cpu": 0}),
    ],
    ids=["all", "one stage's KV", "the smaller one's KV", "KV alone", "nothing"],
)
def test_the_bill_names_what_is_kept(room: int, kept: dict[str, int]) -> None:
    made = plan(other_items(plan(GIB)) + room)
    assert made.estimate is not None
    assert {bill.device: bill.kept_bytes for bill in made.estimate.devices} == kept
    assert ("kept for recovery" in explain(made)) == (room >= 0)


def test_what_the_bill_leaves_is_what_loading_keeps() -> None:
    """And where there is no bill, this process counts too."""
    config = resolve("demo", None, weights=False).config
    structure = inspect(config)
    stages = (StageSpec("cpu", True, (0, 4), False, "bf16"), StageSpec("process/cpu", False, (4, 8), True, "bf16"))
    made = Placement(1, ModelRef("demo", layers=8), WORKLOAD, stages, {"cpu": GIB})
    blocks = pool_sizes(made, structure)
    free = kept_room(made, structure, blocks, journals=False)[1]
    assert free > 0
    tight = replace(made, devices={"cpu": 64 * MIB})
    assert kept_room(tight, structure, blocks, journals=False) == {1: 0}
    assert not journals_fit(tight, structure, blocks)
    billed = estimate(model(layers=8), Cluster((device(), device("process/cpu"))), made)
    bills = [replace(bill, kept_bytes=0, weight_bytes=0, margin_bytes=0) for bill in billed.devices]
    full = [replace(bill, weight_bytes=GIB - bill.total_bytes - free) for bill in bills]
    assert kept_room(replace(made, estimate=replace(billed, devices=tuple(full))), structure, blocks, False) == {
        1: free
    }
    assert kept_room(replace(made, estimate=replace(billed, devices=tuple(full))), structure, blocks, True) == {1: 0}
