"""Whether a placement still suits model and machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from planner_models import GIB, MIB, device, model

from splitrun.planner.check import stale_reasons
from splitrun.planner.facts import Cluster, Workload
from splitrun.planner.solve import solve

MACHINE = Cluster((device(), device("cuda:0", budget=GIB, bandwidth=300e9)))
PLAN = solve(model(layers=8, values=100 * MIB), MACHINE, Workload(), "bf16")
COMMAND = "splitrun plan some/model --context 4096 --weights bf16 -o mine.yaml"


def reasons(**change: Any) -> list[str]:
    facts: dict[str, Any] = {"plan": PLAN, "fingerprint": "sha256:1234", "layers": 8, "cluster": MACHINE}
    facts |= change
    return stale_reasons(facts["plan"], facts["fingerprint"], facts["layers"], facts["cluster"], "mine.yaml")


def machine(**change: Any) -> Cluster:
    return Cluster(tuple(replace(place, **change) if place.name == "cuda:0" else place for place in MACHINE.devices))


def test_a_fresh_plan_is_not_stale() -> None:
    assert set(PLAN.device_names) == {"cpu", "cuda:0"}
    assert reasons() == []
    assert reasons(fingerprint=None) == []
    assert reasons(plan=replace(PLAN, model=replace(PLAN.model, fingerprint=None)), fingerprint="sha256:other") == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fingerprint": "sha256:other"}, "the model some/model changed since it was planned"),
        ({"layers": 9}, "the placement splits 8 layers, but some/model has 9"),
        ({"cluster": Cluster((device(),))}, "device cuda:0 is not here (here: cpu)"),
        ({"cluster": machine(free_bytes=500 * MIB)}, "on cuda:0, but 500 MiB is free"),
    ],
)
def test_each_reason_comes_with_the_command(change: dict[str, Any], why: str) -> None:
    (reason,) = reasons(**change)
    assert why in reason
    assert reason.endswith(COMMAND)


def test_a_context_that_the_model_does_not_know() -> None:
    assert stale_reasons(PLAN, None, 8, MACHINE, "mine.yaml", max_context=4096) == []
    (reason,) = stale_reasons(PLAN, None, 8, MACHINE, "mine.yaml", max_context=512)
    assert reason.startswith("context 4096 is longer than the 512 tokens that some/model knows; plan again: ")
    assert "--context 512 " in reason


def test_all_reasons_at_once() -> None:
    assert len(reasons(fingerprint="x", layers=3, cluster=Cluster(()))) == 4


def test_a_budget_without_an_estimate_counts_whole() -> None:
    plan = replace(PLAN, estimate=None)
    assert reasons(plan=plan) == []
    (reason,) = reasons(plan=plan, cluster=machine(free_bytes=1023 * MIB))
    assert "takes 1.00 GiB on cuda:0, but 1023 MiB is free" in reason


def test_the_budget_may_exceed_what_is_free_while_the_plan_does_not() -> None:
    assert PLAN.estimate is not None
    need = {bill.device: bill.total_bytes for bill in PLAN.estimate.devices}["cuda:0"]
    assert need < GIB
    assert reasons(cluster=machine(free_bytes=need)) == []
    assert len(reasons(cluster=machine(free_bytes=need - 1))) == 1


def test_devices_of_one_memory_count_together() -> None:
    assert PLAN.estimate is not None
    need = sum(bill.total_bytes for bill in PLAN.estimate.devices)
    for spare, count in ((0, 0), (-1, 1)):
        shared = tuple(replace(place, memory_pool="host", free_bytes=need + spare) for place in MACHINE.devices)
        assert len(reasons(cluster=Cluster(shared))) == count


@pytest.mark.parametrize(
    ("formats", "told"),
    [("int8 int8", " --weights int8"), ("bf16 bf16", " --weights bf16"), ("nf4 nf4", ""), ("bf16 nf4", "")],
)
def test_the_command_keeps_the_precision(formats: str, told: str) -> None:
    first, second = formats.split()
    stages = (replace(PLAN.stages[0], weights=first), *(replace(each, weights=second) for each in PLAN.stages[1:]))
    assert len(stages) > 1
    (reason,) = reasons(plan=replace(PLAN, stages=stages), layers=9)
    assert reason.endswith(f"--context 4096{told} -o mine.yaml")


def test_the_command_repeats_the_workload() -> None:
    plan = replace(PLAN, workload=Workload(512, 3, "throughput"))
    (reason,) = reasons(plan=plan, layers=9)
    assert (
        "splitrun plan some/model --context 512 --sessions 3 --objective throughput --weights bf16 -o mine.yaml"
        in reason
    )


def test_the_command_names_the_same_model_and_kv() -> None:
    stages = tuple(replace(stage, device="cpu", kv=replace(stage.kv, dtype="int8")) for stage in PLAN.stages)
    plan = replace(PLAN, model=replace(PLAN.model, source="my models/7B", revision="v2"), stages=stages)
    (reason,) = reasons(plan=plan, layers=9)
    assert "splitrun plan 'my models/7B' --context" in reason
    assert reason.endswith("--revision v2 --kv int8 -o mine.yaml")


def test_a_budget_below_what_the_plan_takes() -> None:
    """A file that was edited."""
    low = replace(PLAN, devices={**PLAN.devices, "cuda:0": 100 * MIB})
    (reason,) = reasons(plan=low)
    assert "on cuda:0, but its budget there is 100 MiB; raise devices.cuda:0.memory in the file, or plan" in reason


def test_more_threads_than_processors() -> None:
    asking = replace(PLAN, stages=(replace(PLAN.stages[0], threads=8), *PLAN.stages[1:]))
    assert stale_reasons(asking, None, 8, MACHINE, processors=8) == []
    stages = (replace(stage, threads="auto" if stage.device == "cpu" else 8) for stage in PLAN.stages)
    on_card = replace(PLAN, stages=tuple(stages))
    assert stale_reasons(on_card, None, 8, MACHINE, processors=4) == []  # cards have no threads
    (reason,) = stale_reasons(asking, None, 8, MACHINE, processors=4)
    assert "asks for 8 threads, but this process may use 4 processors; write threads: auto, or 4" in reason
