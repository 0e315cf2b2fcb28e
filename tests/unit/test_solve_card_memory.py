"""A card in use takes main memory too: what plans make of that."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from planner_models import MIB, device, model, random_model, random_workload
from test_solve_exact import Force, every_plan, instance

from splitrun.errors import DoesNotFit
from splitrun.planner.cost import score
from splitrun.planner.facts import Cluster, ModelProfile, Workload
from splitrun.planner.memory import computes_layers, over_budget, placement_memory, pool_budgets
from splitrun.planner.placement import ModelRef, Placement, StageSpec
from splitrun.planner.solve import solve
from splitrun.planner.what_if import Changes, changed, machine_of

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


def test_a_shortfall_is_told_rather_than_that_a_device_cannot_compute() -> None:
    found = cluster(host=4000, card=60)
    dense = replace(found.devices[0], formats=("bf16",), budget_bytes=4000 * MIB)
    with pytest.raises(DoesNotFit, match="short") as caught:
        solve(model(), replace(found, devices=(dense, found.devices[1])), WORKLOAD, "nf4")
    assert caught.value.shortfall_bytes["cuda:0"] > 0


def test_layers_on_a_card_take_more_than_its_ends() -> None:
    found = replace(cluster(host=4000, card=280), card_layers_bytes=150 * MIB)
    narrow = replace(found.device("cuda:0"), layers_context_bytes=20 * MIB)
    found = replace(found, devices=(found.devices[0], narrow))
    plan = solve(model(), found, WORKLOAD, "bf16")
    assert any(computes_layers(stage) for stage in plan.stages if stage.device == "cuda:0")
    assert plan.estimate is not None
    assert {bill.device: bill.context_bytes >> 20 for bill in plan.estimate.devices} == {"cpu": 550, "cuda:0": 70}
    # A processor that the model fills, but for what a card's process takes: the head may go there, layers may not.
    ends = replace(narrow, holds_layers=False)
    least = solve(model(), replace(found, devices=(found.devices[0], ends), card_layers_bytes=0), WORKLOAD, "bf16")
    assert least.estimate is not None
    bills = {bill.device: bill.total_bytes for bill in least.estimate.devices}
    full = replace(found.devices[0], budget_bytes=bills["cpu"] + MIB)
    plan = solve(
        model(), replace(found, devices=(full, replace(narrow, budget_bytes=bills["cuda:0"]))), WORKLOAD, "bf16"
    )
    assert plan.stages == least.stages
    assert plan.estimate is not None
    assert {bill.device: bill.context_bytes >> 20 for bill in plan.estimate.devices} == {"cpu": 400, "cuda:0": 50}
    assert plan.estimate.notes[0] == "no layers on cuda:0: there they take 150 MiB more of main memory"


def test_equals_brute_force_whatever_a_card_takes_of_main_memory() -> None:
    uses = {"no card": 0, "ends": 0, "layers": 0, "refused": 0}
    for seed in range(7000, 7300):
        profile, cluster, workload = instance(seed)
        cards = cluster.local_cards()
        if not cards or "cpu" not in {place.name for place in cluster.devices}:
            continue
        draw = random.Random(seed)
        more = {"card_process_bytes": draw.choice([20, 100]) * MIB, "card_layers_bytes": draw.choice([20, 100]) * MIB}
        devices = tuple(
            replace(place, layers_context_bytes=draw.choice([0, 40]) * MIB if place.name in cards else 0)
            for place in cluster.devices
        )
        cluster = replace(cluster, devices=devices, **more)
        expected = brute_force(profile, cluster, workload)
        if expected is None:
            uses["refused"] += 1
            continue
        plan = solve(profile, cluster, workload)
        mixed = len({(stage.device, stage.weights) for stage in plan.stages}) > len(plan.device_names)
        found = score(profile, cluster, plan)
        assert found <= expected * (1 + 1e-9), seed
        assert mixed or found == pytest.approx(expected, rel=1e-9), seed
        assert not over_budget(placement_memory(profile, cluster, plan), pool_budgets(cluster)), seed
        layers = any(computes_layers(stage) for stage in plan.stages if stage.device in cards)
        uses["layers" if layers else "ends" if set(cards) & set(plan.device_names) else "no card"] += 1
    assert min(uses.values()) > 2, uses


def brute_force(profile: ModelProfile, cluster: Cluster, workload: Workload) -> float | None:
    """The best score of all placements whose bills keep the budgets, one format per device."""
    force, pools = Force(profile, cluster, workload), pool_budgets(cluster)
    devices = tuple(place for place in cluster.devices if force.formats[place.name])
    best: float | None = None
    for stages in every_plan(profile, devices, force.formats, False):
        value = force.score(stages)
        if best is None or value < best:
            plan = Placement(1, ModelRef("x"), workload, stages)
            best = best if over_budget(placement_memory(profile, cluster, plan), pools) else value
    return best


def test_a_graphics_unit_that_shares_memory_pays_for_the_process_where_the_processor_does_not() -> None:
    cpu = device(context_bytes=400 * MIB)
    graphics = device("xpu:0", kind="xpu", memory_pool="cpu", context_bytes=450 * MIB, process_bytes=400 * MIB)
    shared, profile = Cluster((cpu, graphics)), model(layers=8)
    alone = StageSpec("xpu:0", True, (0, 8), True, "bf16")
    (bill,) = placement_memory(profile, shared, Placement(1, ModelRef("x", layers=8), Workload(), (alone,)))
    assert bill.context_bytes == 450 * MIB
    both = (StageSpec("cpu", True, (0, 4), False, "bf16"), StageSpec("xpu:0", False, (4, 8), True, "bf16"))
    bills = placement_memory(profile, shared, Placement(1, ModelRef("x", layers=8), Workload(), both))
    assert [bill.context_bytes for bill in bills] == [400 * MIB, 50 * MIB]


def test_the_process_is_counted_once_where_graphics_share_the_processor_s_memory() -> None:
    """As the bill does: in budgets where both devices fit beside one process only, both are used."""
    both = closer = refused = 0
    for seed in range(7000, 7120):
        draw = random.Random(seed)
        profile, workload = random_model(draw), random_workload(draw)
        budget, process = draw.choice([150, 220, 300, 400, 600]) * MIB, draw.choice([40, 120]) * MIB
        devices = [
            device(budget=budget, bandwidth=28e9, context_bytes=process),
            device("xpu:0", kind="xpu", budget=budget, bandwidth=draw.choice([10e9, 60e9]), memory_pool="cpu",
                   context_bytes=process + 20 * MIB, process_bytes=process, compute_dtype="bf16"),
        ]  # fmt: skip
        shared = Cluster(tuple(draw.sample(devices, 2)))
        expected = brute_force(profile, shared, workload)
        if expected is None:
            with pytest.raises(DoesNotFit):
                solve(profile, shared, workload)
            refused += 1
            continue
        plan = solve(profile, shared, workload)
        bills = placement_memory(profile, shared, plan)
        assert not over_budget(bills, pool_budgets(shared)), seed
        mixed = len({(stage.device, stage.weights) for stage in plan.stages}) > len(plan.device_names)
        found = score(profile, shared, plan)
        assert found <= expected * (1 + 1e-9), seed
        assert mixed or found == pytest.approx(expected, rel=1e-9), seed
        both += len(plan.device_names) == 2
        closer += len(bills) == 2 and sum(bill.total_bytes for bill in bills) > budget - process
    assert min(both, closer, refused) > 2, (both, closer, refused)


def test_a_data_sheet_s_integrated_graphics_do_not_fit_where_the_process_does_not() -> None:
    """With the processor's budget and the graphics' being the same memory."""
    sheets, _ = changed(machine_of("Core Ultra CPU"), Changes(add=("Core Ultra iGPU",)))
    sizes = (replace(each, budget_bytes=800 * MIB) for each in sheets.devices)
    with pytest.raises(DoesNotFit):
        solve(model(values=20 * MIB), replace(sheets, devices=tuple(sizes)), Workload(context=512), "bf16")
