"""The itemised memory bill of a placement."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_models import GIB, MIB, device, formats_of, model

from splitrun.measure.accelerators import half_type
from splitrun.planner.estimate import DeviceMemory
from splitrun.planner.facts import Cluster, KVGroup, Workload
from splitrun.planner.memory import (
    ALLOCATOR_SHARE,
    MARGIN_SHARE,
    allocator_bytes,
    compute_dtype,
    margin_bytes,
    over_budget,
    placement_memory,
    pool_budgets,
    stage_dtype,
    workspace_bytes,
)
from splitrun.planner.placement import KVSpec, ModelRef, Placement, StageSpec

WORKLOAD = Workload(context=1024, sessions=2)


def bills(*stages: StageSpec, **more: object) -> dict[str, DeviceMemory]:
    profile = model(layers=4, values=10 * MIB, kv=512)
    profile = replace(profile, **more)
    cluster = Cluster((device(), device("cuda:0", budget=GIB)))
    plan = Placement(1, ModelRef("m", layers=4), WORKLOAD, stages, {"cuda:0": 123 * MIB})
    return {bill.device: bill for bill in placement_memory(profile, cluster, plan)}


def test_items_of_a_whole_model_on_one_device() -> None:
    (bill,) = bills(StageSpec("cpu", True, (0, 4), True, "bf16")).values()
    assert bill.weight_bytes == 6 * 20 * MIB
    assert bill.kv_bytes == 4 * 512 * 1024 * 2 * 2  # layers, values, tokens, sessions, bytes
    assert bill.state_bytes == 0
    assert bill.context_bytes == 0
    held = bill.weight_bytes + bill.kv_bytes
    assert bill.margin_bytes == 16 * MIB + held // MARGIN_SHARE
    assert bill.allocator_bytes == 4 * MIB + held // ALLOCATOR_SHARE
    assert bill.expected_bytes == held + bill.workspace_bytes + bill.allocator_bytes
    assert bill.total_bytes == bill.expected_bytes + bill.margin_bytes
    assert bill.budget_bytes == 8 * GIB


def test_two_stages_of_one_device_are_one_bill() -> None:
    found = bills(
        StageSpec("cpu", True, (0, 1), False, "bf16"),
        StageSpec("cuda:0", False, (1, 2), False, "nf4"),
        StageSpec("cpu", False, (2, 4), True, "int8"),
    )
    assert found["cpu"].weight_bytes == (20 + 20 + 10 + 10 + 10) * MIB
    assert found["cuda:0"].weight_bytes == int(10 * MIB * 0.5625)
    assert found["cuda:0"].context_bytes == 256 * MIB
    assert found["cuda:0"].budget_bytes == 123 * MIB  # the placement's, not the device's


def test_blocks_and_type_of_the_cache_are_the_stage_s_own() -> None:
    (bill,) = bills(StageSpec("cpu", True, (0, 4), True, "bf16", KVSpec("fp32", device_blocks=3))).values()
    assert bill.kv_bytes == 4 * 512 * 3 * 64 * 4


def test_tied_tensors_are_paid_once_per_device_and_format() -> None:
    tied = {"tied_bytes": formats_of(10 * MIB)}
    whole = StageSpec("cpu", True, (0, 4), True, "bf16")
    assert bills(whole, **tied)["cpu"].weight_bytes == 5 * 20 * MIB
    first, last = StageSpec("cpu", True, (0, 2), False, "bf16"), StageSpec("cpu", False, (2, 4), True, "int8")
    assert bills(first, last, **tied)["cpu"].weight_bytes == (3 * 20 + 3 * 10) * MIB  # two formats, two copies
    elsewhere = StageSpec("cuda:0", False, (2, 4), True, "bf16")
    found = bills(first, elsewhere, **tied)
    assert found["cpu"].weight_bytes + found["cuda:0"].weight_bytes == 6 * 20 * MIB


def test_state_is_a_slot_per_session() -> None:
    base = model(layers=4)
    units = tuple(
        replace(unit, kv_values_per_token={}, state_bytes=MIB * unit.name.startswith("l")) for unit in base.units
    )
    (bill,) = bills(StageSpec("cpu", True, (0, 4), True), units=units, groups=(KVGroup("state"),)).values()
    assert (bill.kv_bytes, bill.state_bytes) == (0, 4 * 2 * MIB)


def test_workspace() -> None:
    base = model(layers=1)
    layer = replace(base.units[1], largest_weight_values=5000, activation_values_per_token=100)
    profile = replace(base, units=(base.units[0], layer, base.units[2]))
    workload = Workload(context=1024, sessions=2, chunk_tokens=256)
    activations = 256 * (2 * 1024 + 100) * 2
    gathered = 512 * 1024 * 2 * 2  # K and V of both sessions
    attention = gathered * 2 + gathered // 2 + 256 * 1024 * 3  # spread over the heads, one copied, and the mask
    cpu = device()
    assert workspace_bytes(profile, 1, cpu, "bf16", workload, "bf16") == activations + attention
    assert workspace_bytes(profile, 1, cpu, "nf4", workload, "bf16") == activations + attention + 5000 * 2
    assert workspace_bytes(profile, 1, cpu, "fp32", workload, "fp32") == 2 * (activations + attention) - 256 * 1024
    scores = replace(profile, units=(base.units[0], replace(layer, score_heads=4, heads_per_kv=3), base.units[2]))
    more = 2 * gathered + 4 * 256 * 1024 * (2 * 2 + 10)
    assert workspace_bytes(scores, 1, cpu, "bf16", workload, "bf16") == activations + attention + more
    assert workspace_bytes(profile, 0, cpu, "bf16", workload, "bf16") == 256 * 2 * 1024 * 2
    assert (
        workspace_bytes(profile, 2, cpu, "bf16", workload, "bf16")
        == 2 * 2 * 1024 * 2 + 2 * 32000 * 4 * 3 + 32 * 32000 * 10
    )


def test_the_margin_of_a_gpu_leaves_room_for_its_libraries() -> None:
    assert margin_bytes(device("cuda:0"), 0) == allocator_bytes(device("cuda:0"), 0) == 32 * MIB
    assert margin_bytes(device("cpu"), 64 * MIB) == 17 * MIB
    assert allocator_bytes(device("cpu"), 128 * MIB) == 5 * MIB


@pytest.mark.parametrize(("weights", "own", "dtype"), [("fp32", "bf16", "fp32"), ("nf4", "fp16", "fp16")])
def test_compute_dtype(weights: str, own: str, dtype: str) -> None:
    assert compute_dtype(device(compute_dtype=own), weights) == dtype


def bill(name: str, total: int, budget: int, pool: str) -> DeviceMemory:
    return DeviceMemory(name, pool, budget, total, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("found", "pools", "excess"),
    [
        ([bill("cpu", 9, 10, "host")], None, {}),
        ([bill("cpu", 12, 10, "host")], None, {"cpu": 2}),
        ([bill("cpu", 9, 10, "host"), bill("cuda:0", 9, 10, "cuda:0")], None, {}),
        ([bill("cpu", 9, 10, "host"), bill("cuda:0", 3, 4, "host")], None, {"cuda:0": 2}),
        ([bill("cpu", 1, 10, "host"), bill("cuda:0", 9, 4, "host")], None, {"cuda:0": 5}),
        ([bill("a", 4, 4, "host"), bill("b", 4, 4, "host")], {"host": 8}, {}),
    ],
)
def test_over_budget(found: list[DeviceMemory], pools: dict[str, int] | None, excess: dict[str, int]) -> None:
    assert over_budget(found, pools) == excess


def test_a_pool_s_budget_is_the_largest_of_its_devices() -> None:
    cluster = Cluster((device(budget=9, memory_pool="h"), device("cuda:0", budget=4, memory_pool="h"), device("mps")))
    assert pool_budgets(cluster) == {"h": 9, "mps": 8 * GIB}


@pytest.mark.parametrize(
    ("kind", "capability", "expected"),
    [
        ("cuda", (7, 5), "fp16"),
        ("cuda", (8, 0), "bf16"),
        ("cuda", None, "bf16"),
        ("mps", None, "fp16"),
        ("cpu", None, "bf16"),
    ],
)
def test_planner_and_engine_have_one_rule_for_types(
    kind: str, capability: tuple[int, int] | None, expected: str
) -> None:
    own = half_type(kind, capability)
    assert own == expected
    assert [stage_dtype(own, weights) for weights in ("nf4", "int8", "fp32")] == [own, own, "fp32"]
