"""Weights streamed to a card for prompts: what it costs, when it pays, and that the slabs are on the bill."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from planner_models import GIB, MIB, device, model

from splitrun.planner.cost import estimate, prefill_s
from splitrun.planner.derivation import derivation
from splitrun.planner.facts import Cluster, Link, Workload
from splitrun.planner.memory import placement_memory
from splitrun.planner.placement import ModelRef, Placement, StageSpec
from splitrun.planner.seconds import DOUBLING, DecodeLine, DeviceSeconds, UnitSeconds
from splitrun.planner.solve import solve
from splitrun.planner.stream import (
    crossover_tokens,
    first_token_gain_s,
    prompt_notes,
    slab_bytes,
    streamed_s,
    with_stream_buffer,
)

PROFILE = model(layers=8, values=40 * MIB)
HOST = device(bandwidth=28e9, flops_per_s=0.5e12)
CARD = device("cuda:0", budget=2 * GIB, bandwidth=900e9, flops_per_s=60e12, context_bytes=256 * MIB)
WIRE = {("cpu", "cuda:0"): Link(20e-6, 25e9), ("cuda:0", "cpu"): Link(20e-6, 25e9)}
CLUSTER = Cluster((HOST, CARD), WIRE)
ON_HOST = StageSpec("cpu", True, (0, 4), False, "bf16")
PLAN = Placement(1, ModelRef("x", layers=8), Workload(), (ON_HOST, StageSpec("cuda:0", False, (4, 8), True, "bf16")))


def test_a_layer_takes_the_longer_of_copy_and_compute() -> None:
    copy_s = 80 * MIB / 25e9
    compute_s = prefill_s(PROFILE, 1, CARD, "bf16", Workload(), "bf16")
    assert streamed_s(PROFILE, CLUSTER, CARD, ON_HOST, Workload()) == pytest.approx(4 * max(copy_s, compute_s) + copy_s)


def test_a_layer_that_is_copied_computes_what_there_is_and_no_more() -> None:
    each = UnitSeconds((DecodeLine(1, 0.0, 0.0),), ((128, 0.128), (512, 0.512)), chunk_step=DOUBLING)
    timed = replace(PROFILE, seconds={("cuda:0", "bf16"): DeviceSeconds(each, (each,) * 10)})
    chunk = Workload(prompt_tokens=300)
    assert prefill_s(timed, 1, CARD, "bf16", chunk, "bf16") == pytest.approx(0.512)
    assert streamed_s(timed, CLUSTER, CARD, ON_HOST, chunk) == pytest.approx(4 * 0.3 + 80 * MIB / 25e9)


def test_long_chunks_pay_and_short_ones_do_not() -> None:
    found = crossover_tokens(PROFILE, CLUSTER, PLAN, ON_HOST)
    assert found is not None
    at = replace(PLAN.workload, prompt_tokens=found)
    resident = sum(prefill_s(PROFILE, unit, HOST, "bf16", at, "bf16") for unit in range(1, 5))
    assert streamed_s(PROFILE, CLUSTER, CARD, ON_HOST, at) < resident
    slow = replace(CLUSTER, links={pair: Link(20e-6, 0.1e9) for pair in WIRE})
    assert crossover_tokens(PROFILE, slow, PLAN, ON_HOST) is None
    assert crossover_tokens(PROFILE, CLUSTER, PLAN, PLAN.stages[1]) is None


def test_slabs_are_planned_and_on_the_bill() -> None:
    made = with_stream_buffer(PROFILE, CLUSTER, PLAN)
    size = slab_bytes(PROFILE, ON_HOST)
    assert 2 * 80 * MIB < size < 2 * 80.1 * MIB
    assert [stage.stream_buffer_bytes for stage in made.stages] == [0, size]
    before, after = (placement_memory(PROFILE, CLUSTER, plan) for plan in (PLAN, made))
    assert after[1].workspace_bytes - before[1].workspace_bytes > size  # layers of both kinds may compute at once
    token_bytes = 512 * 2  # one layer's, in bf16
    pinned = 2 * 4096 * token_bytes + 4 * 1024 * token_bytes  # two histories; four layers' 512 + 128 tokens, rounded up
    assert after[0].workspace_bytes - before[0].workspace_bytes == pinned
    assert first_token_gain_s(PROFILE, CLUSTER, made) > 0
    assert first_token_gain_s(PROFILE, CLUSTER, PLAN) == 0


def test_the_plan_carries_from_how_many_tokens_on_a_stage_gains() -> None:
    slow = replace(CLUSTER, links={pair: Link(20e-6, 4e9) for pair in WIRE})
    for cluster in (CLUSTER, slow):
        made = with_stream_buffer(PROFILE, cluster, PLAN)
        assert made.stages[0].stream_from_tokens == crossover_tokens(PROFILE, cluster, PLAN, ON_HOST)
    assert made.stages[0].stream_from_tokens > 32
    few = replace(made, workload=replace(made.workload, prompt_tokens=made.stages[0].stream_from_tokens - 1))
    assert first_token_gain_s(PROFILE, slow, few) == 0  # such a prompt is computed where the layers lie
    other = replace(made, stages=(replace(made.stages[0], stream_from_tokens=513), made.stages[1]))
    assert placement_memory(PROFILE, slow, other)[0] == placement_memory(PROFILE, slow, PLAN)[0]  # nothing is pinned


def test_slabs_that_do_not_fit_are_advised_with_the_room_they_take() -> None:
    (note,) = prompt_notes(PROFILE, CLUSTER, PLAN)
    assert note.startswith("weights on the processor are copied to the card for prompts: the first token comes ")
    tight = Cluster((HOST, replace(CARD, budget_bytes=800 * MIB)), WIRE)
    (note,) = prompt_notes(PROFILE, tight, PLAN)
    more = re.match(r"with (\d+) MiB more on cuda:0 the weights on the processor could be copied", note)
    assert more
    card = replace(CARD, budget_bytes=(801 + int(more[1])) * MIB)
    assert with_stream_buffer(PROFILE, Cluster((HOST, card), WIRE), PLAN) != PLAN


def test_plans_over_many_devices_have_slabs_too() -> None:
    """Or hear what they lack for it. More devices than are searched exactly, all but two of no use."""
    others = tuple(device(f"n{number}/cpu", bandwidth=(number + 1) * 1e6, budget=900 * MIB) for number in range(9))
    cluster = Cluster((HOST, replace(CARD, budget_bytes=800 * MIB), *others), WIRE)
    plan = solve(PROFILE, cluster, PLAN.workload, "bf16", stream=True)
    assert plan.estimate is not None
    assert any("too many, and too different" in note for note in plan.estimate.notes)
    told = r"with .* more on cuda:0 the weights on the processor could be copied to the card for prompts"
    assert any(re.match(told, note) for note in plan.estimate.notes)


def test_the_derivation_names_the_slabs() -> None:
    for plan, told in ((PLAN, False), (with_stream_buffer(PROFILE, CLUSTER, PLAN), True)):
        lines = derivation(replace(plan, estimate=estimate(PROFILE, CLUSTER, plan)))
        assert any("with slabs" in line for line in lines) == told


def test_slabs_by_hand_that_cost_time_are_foretold_so() -> None:
    slow = replace(CLUSTER, links={pair: Link(20e-6, 0.1e9) for pair in WIRE})
    by_hand = replace(PLAN, stages=(ON_HOST, replace(PLAN.stages[1], stream_buffer_bytes=slab_bytes(PROFILE, ON_HOST))))
    assert first_token_gain_s(PROFILE, slow, by_hand) < 0


def test_main_memory_that_is_too_small_for_pinned_pages_gets_no_slabs() -> None:
    needed = placement_memory(PROFILE, CLUSTER, PLAN)[0].total_bytes
    tight = Cluster((replace(HOST, budget_bytes=needed + MIB), CARD), WIRE)
    assert with_stream_buffer(PROFILE, tight, PLAN) == PLAN


@pytest.mark.parametrize(
    "cluster",
    [
        Cluster((HOST, replace(CARD, budget_bytes=800 * MIB)), WIRE),  # no room for slabs
        Cluster((HOST, replace(CARD, memory_pool="host")), WIRE),  # host and card share memory
    ],
)
def test_where_slabs_are_not_planned(cluster: Cluster) -> None:
    assert with_stream_buffer(PROFILE, cluster, PLAN) == PLAN


def test_other_models_and_other_machines_compute_their_prompts_where_they_lie() -> None:
    assert crossover_tokens(replace(PROFILE, model_type="gemma2"), CLUSTER, PLAN, ON_HOST) is None
    far = Cluster((HOST, replace(HOST, name="attic/cpu"), CARD), WIRE | {("attic/cpu", "cuda:0"): Link(20e-6, 25e9)})
    assert crossover_tokens(PROFILE, far, PLAN, replace(ON_HOST, device="attic/cpu")) is None


def test_the_plan_says_what_prompts_gain() -> None:
    slow = replace(CARD, bandwidth_bytes_per_s=15e9)  # layers that fit main memory decode there
    for host, slabs in ((700 * MIB, True), (900 * MIB, False)):
        cluster = Cluster((replace(HOST, budget_bytes=host), slow), WIRE)
        found = solve(PROFILE, cluster, Workload(), "bf16", stream=True)
        assert found.estimate is not None
        told = any("are copied to the card for prompts: the first token comes" in note for note in found.estimate.notes)
        assert told == slabs
        assert any(stage.stream_buffer_bytes for stage in found.stages) == slabs
