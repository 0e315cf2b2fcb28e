"""A card in use takes main memory too: what plans make of that."""

from __future__ import annotations

import pytest
from planner_models import MIB, device, model

from splitrun.errors import DoesNotFit
from splitrun.planner.facts import Cluster, Workload
from splitrun.planner.memory import placement_memory
from splitrun.planner.solve import solve

WORKLOAD = Workload(context=256)


def cluster(host: int, card: int, speed: float = 400e9) -> Cluster:
    """A processor and a card with those budgets in MiB; a card in use takes 300 MiB of main memory."""
    return Cluster(
        (
            device(budget=host * MIB, context_bytes=100 * MIB),
            device("cuda:0", budget=card * MIB, bandwidth=speed, context_bytes=50 * MIB),
        ),
        card_process_bytes=300 * MIB,
    )


def test_the_processor_pays_for_a_card_that_is_used() -> None:
    found = cluster(host=2000, card=280)
    plan = solve(model(), found, WORKLOAD, "bf16")
    assert set(plan.device_names) == {"cpu", "cuda:0"}
    assert plan.estimate is not None
    paid = {bill.device: bill.context_bytes >> 20 for bill in plan.estimate.devices}
    assert paid == {"cpu": 400, "cuda:0": 50}
    assert {bill.device: bill.context_bytes >> 20 for bill in placement_memory(model(), found, plan)} == paid


def test_main_memory_that_holds_no_card_beside_the_model() -> None:
    least = solve(model(), cluster(host=2000, card=1), WORKLOAD, "nf4").estimate
    assert least is not None
    enough = (least.devices[0].total_bytes >> 20) + 1
    plan = solve(model(), cluster(host=enough, card=60), WORKLOAD, "nf4")
    assert plan.device_names == ("cpu",)
    assert plan.estimate is not None
    assert plan.estimate.devices[0].context_bytes == 100 * MIB
    assert plan.estimate.notes[0].startswith("cuda:0 left out: a card in use takes 300 MiB more of main memory")


def test_a_card_that_would_slow_the_plan_is_not_paid_for() -> None:
    plan = solve(model(), cluster(host=4000, card=2000, speed=1e9), WORKLOAD)
    assert plan.device_names == ("cpu",)
    assert plan.estimate is not None
    assert plan.estimate.devices[0].context_bytes == 100 * MIB
    assert sum(note.startswith("cuda:0 was left out") for note in plan.estimate.notes) == 1


def test_a_refusal_names_the_smaller_shortfall() -> None:
    least = solve(model(), cluster(host=2000, card=1), WORKLOAD, "nf4").estimate
    assert least is not None
    short = (least.devices[0].total_bytes >> 20) - 10
    with pytest.raises(DoesNotFit) as caught:
        solve(model(), cluster(host=short, card=51), WORKLOAD, "nf4")
    assert 9 * MIB <= caught.value.shortfall_bytes["cpu"] <= 11 * MIB
