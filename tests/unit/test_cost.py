"""Predicted seconds: units, hops, whole plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_models import GIB, MIB, device, model, unit

from splitrun.planner.cost import best_streams, decode_s, estimate, hop_s, pass_s, prefill_s, score
from splitrun.planner.facts import Cluster, KVGroup, Link, Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec
from splitrun.planner.seconds import DecodeLine, DeviceSeconds, UnitSeconds
from splitrun.planner.solve import solve

CPU = device(bandwidth=10e9, flops_per_s=1e12, unit_overhead_s=1e-3)
WORKLOAD = Workload(context=2048)


def test_a_decoded_token_reads_weights_and_half_a_context_of_history() -> None:
    profile = model(values=10 * MIB, kv=512)
    moved = 20 * MIB + 512 * 1024 * 2
    assert decode_s(profile, 1, CPU, "bf16", WORKLOAD, "bf16") == pytest.approx(moved / 10e9 + 1e-3)
    assert decode_s(profile, 1, CPU, "nf4", WORKLOAD, "fp32") < decode_s(profile, 1, CPU, "bf16", WORKLOAD, "bf16")


def test_rows_share_the_weights_but_not_the_history() -> None:
    profile = model(values=10 * MIB, kv=512)
    moved = 20 * MIB + 4 * 512 * 1024 * 2
    assert decode_s(profile, 1, CPU, "bf16", WORKLOAD, "bf16", rows=4) == pytest.approx(moved / 10e9 + 1e-3)


def test_a_slow_processor_is_bound_by_operations() -> None:
    slow = device(bandwidth=1e12, flops_per_s=1e9, unit_overhead_s=0.0)
    profile = model(values=10 * MIB)
    assert decode_s(profile, 1, slow, "bf16", WORKLOAD, "bf16") == pytest.approx(2 * 10 * MIB / 1e9)


def test_an_expert_mixture_reads_its_active_experts_until_rows_need_all() -> None:
    base = model(layers=1, kv=0)
    profile = replace(base, units=(base.units[0], unit("layer 0", 80 * MIB, read=0.25), base.units[2]))
    bare = device(bandwidth=10e9, flops_per_s=1e18, unit_overhead_s=0.0)
    seconds = [decode_s(profile, 1, bare, "bf16", WORKLOAD, "bf16", rows=rows) for rows in (1, 2, 4, 8)]
    assert seconds == pytest.approx([0.25 * s for s in (seconds[3], 2 * seconds[3], 4 * seconds[3], 4 * seconds[3])])


def test_a_window_limits_the_history_that_is_read() -> None:
    base = model(layers=1)
    rows = [replace(base.units[1], kv_values_per_token={name: 512}) for name in ("full", "sliding(100)")]
    groups = (KVGroup("full"), KVGroup("sliding", 100))
    profiles = [replace(base, units=(base.units[0], row, base.units[2]), groups=groups) for row in rows]
    full, sliding = (decode_s(profile, 1, CPU, "bf16", WORKLOAD, "bf16") for profile in profiles)
    assert full - sliding == pytest.approx(512 * (1024 - 100) * 2 / 10e9)


def test_a_prompt_goes_in_chunks_and_the_head_computes_one_row() -> None:
    profile = model(values=10 * MIB, kv=0)
    whole = prefill_s(profile, 1, CPU, "bf16", WORKLOAD, "bf16")
    assert whole == pytest.approx(max(20 * MIB / 10e9, 512 * 20 * MIB / 1e12) + 1e-3)
    halves = prefill_s(profile, 1, CPU, "bf16", replace(WORKLOAD, chunk_tokens=256), "bf16")
    assert halves == pytest.approx(whole + 1e-3)
    head = len(profile.units) - 1
    assert prefill_s(profile, head, CPU, "bf16", WORKLOAD, "bf16") == decode_s(
        profile, head, CPU, "bf16", WORKLOAD, "bf16"
    )


def test_hops() -> None:
    cluster = Cluster((CPU, device("cuda:0")), {("cpu", "cuda:0"): Link(1e-3, 1e6)}, Link(2e-3, 1e6))
    assert hop_s(cluster, "cpu", "cpu", 1000, WORKLOAD, prefill=False) == 0
    assert hop_s(cluster, "cpu", "cuda:0", 1000, WORKLOAD, prefill=False) == pytest.approx(2e-3)
    assert hop_s(cluster, "cuda:0", "cpu", 1000, WORKLOAD, prefill=False, rows=2) == pytest.approx(4e-3)
    assert hop_s(cluster, "cpu", "cuda:0", 1000, replace(WORKLOAD, chunk_tokens=256), prefill=True) == pytest.approx(
        0.514
    )


def two_stages(workload: Workload) -> tuple[Cluster, Placement]:
    cluster = Cluster((CPU, device("cuda:0", budget=GIB, bandwidth=100e9)))
    stages = (StageSpec("cpu", True, (0, 4), False), StageSpec("cuda:0", False, (4, 8), True))
    return cluster, Placement(1, ModelRef("m", layers=8), workload, stages)


def test_an_estimate_adds_up() -> None:
    profile = model()
    cluster, plan = two_stages(Workload())
    found = estimate(profile, cluster, plan)
    assert found.step_s == pytest.approx(sum(s.decode_s + s.hop_s for s in found.stages))
    assert found.decode_tokens_per_s == pytest.approx(1 / found.step_s)
    assert found.time_to_first_token_s == pytest.approx(pass_s(profile, cluster, plan, prefill=True))
    assert found.prefill_tokens_per_s == pytest.approx(512 / found.time_to_first_token_s)
    assert found.throughput_tokens_per_s == pytest.approx(found.decode_tokens_per_s)  # one session
    assert [s.units for s in found.stages] == ["embed + layers 0–3", "layers 4–7 + head"]
    assert [bill.device for bill in found.devices] == ["cpu", "cuda:0"]


def test_many_sessions_keep_both_devices_busy() -> None:
    profile = model(kv=0)
    cluster, plan = two_stages(Workload(sessions=2))
    slowest = max(s.decode_s for s in estimate(profile, cluster, plan).stages)
    # one group of two rows reads the weights once, which beats two groups by turns here
    assert best_streams(profile, cluster, plan) == 1
    turns, together = (estimate(profile, cluster, replace(plan, streams=streams)) for streams in (None, 1))
    assert (turns.streams, together.streams) == (2, 1)
    assert together.throughput_tokens_per_s > turns.throughput_tokens_per_s == pytest.approx(1 / slowest)
    assert together.throughput_tokens_per_s > together.decode_tokens_per_s


@pytest.mark.parametrize("objective", ["latency", "throughput", "first-token"])
def test_the_score_is_the_objective_s_figure(objective: str) -> None:
    profile = model()
    workload = replace(Workload(sessions=3), objective=objective)
    cluster, plan = two_stages(workload)
    found = estimate(profile, cluster, plan)
    expected = {"latency": found.step_s, "first-token": found.time_to_first_token_s}
    if objective == "throughput":
        assert score(profile, cluster, plan) > max(s.decode_s for s in found.stages)  # three rows, slowest device
    else:
        assert score(profile, cluster, plan) == pytest.approx(expected[objective])


def test_a_short_context_shortens_the_reference_prompt() -> None:
    found = solve(model(), Cluster((CPU,)), Workload(context=100)).estimate
    assert found is not None
    assert (found.prompt_tokens, found.history_tokens) == (100, 50)


def test_the_engine_takes_less_where_the_processor_reads_no_weights_and_more_for_a_first_token() -> None:
    profile, card = model(layers=2), device("cuda:0")
    cluster = Cluster((CPU, card), step_s=3e-4, warm_step_s=1e-4, request_s=5e-4)

    def own_s(*stages: StageSpec, prefill: bool = False, of: Cluster = cluster) -> float:
        placement = Placement(1, ModelRef("m", layers=2), WORKLOAD, stages)
        bare = replace(of, step_s=0.0, warm_step_s=0.0, request_s=0.0)
        return pass_s(profile, of, placement, prefill) - pass_s(profile, bare, placement, prefill)

    embedding = StageSpec("cpu", True, (0, 0), False, "bf16")
    split = (StageSpec("cpu", True, (0, 1), False, "bf16"), StageSpec("cuda:0", False, (1, 2), True, "bf16"))
    assert own_s(embedding, StageSpec("cuda:0", False, (0, 2), True, "bf16")) == pytest.approx(1e-4)
    assert own_s(*split) == pytest.approx(3e-4)
    assert own_s(*split, prefill=True) == pytest.approx(8e-4)
    assert own_s(
        StageSpec("cuda:0", True, (0, 2), True, "bf16"), of=replace(cluster, warm_step_s=None)
    ) == pytest.approx(3e-4)


def test_a_measured_head_computes_one_row_of_a_long_prompt_too() -> None:
    nothing, head = (UnitSeconds((DecodeLine(1, 0.0, 0.0),), ((32, seconds),)) for seconds in (0.0, 0.02))
    profile = model(layers=2)
    timed = DeviceSeconds(nothing, (nothing,) * (len(profile.units) - 1) + (head,))
    profile = replace(profile, seconds={("cpu", "bf16"): timed})
    last = len(profile.units) - 1
    one, four = (
        prefill_s(profile, last, device(), "bf16", Workload(context=4096, prompt_tokens=tokens), "bf16")
        for tokens in (512, 2048)
    )
    assert one == four > 0
