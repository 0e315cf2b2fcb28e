"""Where the stages of a lost machine go while all others stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_models import GIB, MIB, device, model

from splitrun.engine.remaining import placement_here
from splitrun.planner.facts import Cluster, Workload
from splitrun.planner.facts_file import Facts
from splitrun.planner.placement import ModelRef, Placement, StageSpec

WORKLOAD = Workload(context=1024)
PLACEMENT = Placement(
    1,
    ModelRef("some/model", layers=8),
    WORKLOAD,
    (StageSpec("cpu", True, (0, 4), False), StageSpec("far/cpu", False, (4, 8), True)),
)
LOST = [1]


def here(cpu: object, *others: object, placement: Placement = PLACEMENT, kept: int = 0) -> list[str] | None:
    """The devices of the stages, as a plan with these devices has them."""
    facts = Facts(model(), Cluster((cpu, *others)))  # type: ignore[arg-type]
    found = placement_here(placement, facts, {"far"}, LOST, kept)
    if found is None:
        return None
    assert [spec.layers for spec in found.stages] == [spec.layers for spec in placement.stages]
    return [spec.device for spec in found.stages]


@pytest.mark.parametrize(
    ("cpu", "budget", "kept", "expected"),
    [
        (device("cpu"), None, 0, ["cpu", "cpu"]),
        (device("cpu", free_bytes=50 * MIB), None, 0, None),  # five units of 20 MiB
        (device("cpu", free_bytes=200 * MIB), None, 0, ["cpu", "cpu"]),
        (device("cpu"), 150 * MIB, 0, None),  # ten units are more than the plan allows there
        (device("cpu"), 400 * MIB, 0, ["cpu", "cpu"]),
        (device("cpu"), 400 * MIB, 200 * MIB, None),  # what is kept lies there too
        (device("cpu", formats=("fp32",)), None, 0, None),
    ],
    ids=["room", "nothing free", "just enough free", "over budget", "within budget", "beside what is kept", "format"],
)
def test_stages_come_here_where_there_is_room(
    cpu: object, budget: int | None, kept: int, expected: list[str] | None
) -> None:
    planned = replace(PLACEMENT, devices={"cpu": budget}) if budget else PLACEMENT
    assert here(cpu, placement=planned, kept=kept) == expected


def test_the_fastest_device_with_room_takes_them() -> None:
    card = device("cuda:0", bandwidth=500e9, budget=GIB)
    first = replace(PLACEMENT.stages[0], layers=(0, 1))
    placement = replace(PLACEMENT, stages=(first, replace(PLACEMENT.stages[1], layers=(1, 8))))
    assert here(device("cpu", bandwidth=200e9), card, placement=placement) == ["cpu", "cuda:0"]
    full = replace(card, free_bytes=300 * MIB, budget_bytes=300 * MIB)  # its context takes 256
    assert here(device("cpu", bandwidth=300e9), full, placement=placement) == ["cpu", "cpu"]


def test_not_where_moving_the_others_too_is_much_faster() -> None:
    card = device("cuda:0", bandwidth=2000e9, budget=GIB)
    assert here(device("cpu"), card) is None


def test_stages_of_nodes_that_remain_stay_there() -> None:
    stages = (
        StageSpec("near/cpu", True, (0, 4), False),
        StageSpec("far/cpu", False, (4, 8), True),
    )
    near = device("near/cpu", memory_pool="near/host")
    placement = replace(PLACEMENT, stages=stages)
    slow = device("cpu", budget=150 * MIB)
    assert here(slow, replace(near, budget_bytes=150 * MIB), placement=placement) == ["near/cpu", "cpu"]
    assert here(slow, placement=placement) is None  # nobody knows the other one
