"""The solver against brute force, and what it says when it leaves out or refuses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from planner_models import GIB, MIB, device, formats_of, model, random_cluster, random_model, random_workload, unit

from splitrun.errors import DoesNotFit, InvalidPlacement
from splitrun.planner.cost import pass_s, score
from splitrun.planner.facts import Cluster, Device, ModelProfile, Workload
from splitrun.planner.memory import compute_dtype, over_budget, placement_memory, pool_budgets
from splitrun.planner.placement import KVSpec, ModelRef, Placement, StageSpec
from splitrun.planner.solve import allowed_formats, solve


def chains(layers: int, devices: tuple[Device, ...]) -> Iterator[list[tuple[Device, int, int]]]:
    """Every way to give all layers to distinct devices, one run each."""
    for count in range(1, min(layers, len(devices)) + 1):
        for order in itertools.permutations(devices, count):
            for cuts in itertools.combinations(range(1, layers), count - 1):
                edges = (0, *cuts, layers)
                yield [(order[i], edges[i], edges[i + 1]) for i in range(count)]


def every_placement(
    profile: ModelProfile, devices: tuple[Device, ...], workload: Workload, weights: str
) -> Iterator[Placement]:
    def stage(place: Device, start: int, stop: int, embed: bool, head: bool) -> StageSpec:
        return StageSpec(place.name, embed, (start, stop), head, weights, KVSpec(compute_dtype(place, weights)))

    n = profile.layers
    for chain in chains(n, devices):
        for first, last in itertools.product(devices, repeat=2):
            stages = []
            if first is not chain[0][0]:
                stages.append(stage(first, 0, 0, True, False))
            for place, start, stop in chain:
                joins_embed = start == 0 and first is place
                joins_head = stop == n and last is place
                stages.append(stage(place, start, stop, joins_embed, joins_head))
            if last is not chain[-1][0]:
                stages.append(stage(last, n, n, False, True))
            yield Placement(1, ModelRef(profile.source, layers=n), workload, tuple(stages))


def best_by_force(profile: ModelProfile, cluster: Cluster, workload: Workload) -> tuple[str, float] | None:
    """(format, score) of the best placement of the most precise format that fits, by trying all of them."""
    pools = pool_budgets(cluster)
    for weights in allowed_formats(profile):
        devices = tuple(place for place in cluster.devices if weights in place.formats)
        scores = [
            score(profile, cluster, placement)
            for placement in every_placement(profile, devices, workload, weights)
            if not over_budget(placement_memory(profile, cluster, placement), pools)
        ]
        if scores:
            return weights, min(scores)
    return None


@pytest.mark.parametrize("block", range(8))
def test_equals_brute_force(block: int) -> None:
    fitted = refused = 0
    for seed in range(block * 50, block * 50 + 50):
        draw = random.Random(seed)
        profile, cluster, workload = random_model(draw), random_cluster(draw), random_workload(draw)
        expected = best_by_force(profile, cluster, workload)
        if expected is None:
            with pytest.raises(DoesNotFit):
                solve(profile, cluster, workload)
            refused += 1
            continue
        placement = solve(profile, cluster, workload)
        assert {stage.weights for stage in placement.stages} == {expected[0]}, seed
        assert score(profile, cluster, placement) == pytest.approx(expected[1], rel=1e-9), seed
        assert not over_budget(placement_memory(profile, cluster, placement), pool_budgets(cluster)), seed
        fitted += 1
    assert fitted > 10
    assert refused > 2  # the instances must exercise both answers


def test_throughput_takes_the_quickest_of_equally_balanced_plans() -> None:
    for seed in range(1000, 1060):
        draw = random.Random(seed)
        profile, cluster = random_model(draw), random_cluster(draw)
        cluster = Cluster(tuple(replace(place, budget_bytes=GIB) for place in cluster.devices), cluster.links)
        workload = replace(random_workload(draw), objective="throughput")
        weights = allowed_formats(profile)[0]
        devices = tuple(place for place in cluster.devices if weights in place.formats)
        if not devices:
            continue
        found = solve(profile, cluster, workload, weights)
        pools = pool_budgets(cluster)
        balanced = [
            pass_s(profile, cluster, placement, prefill=False, rows=workload.sessions)
            for placement in every_placement(profile, devices, workload, weights)
            if not over_budget(placement_memory(profile, cluster, placement), pools)
            and score(profile, cluster, placement) <= score(profile, cluster, found) * (1 + 1e-9)
        ]
        seconds = pass_s(profile, cluster, found, prefill=False, rows=workload.sessions)
        assert seconds == pytest.approx(min(balanced), rel=1e-9), seed


def test_a_small_card_takes_what_fits_and_the_cpu_the_rest() -> None:
    profile = model(layers=8, values=100 * MIB)
    card = device("cuda:0", budget=GIB, bandwidth=300e9)
    placement = solve(profile, Cluster((device(), card)), Workload(), "bf16")
    assert set(placement.device_names) == {"cpu", "cuda:0"}
    estimate = placement.estimate
    assert estimate is not None
    assert "memory of cuda:0: with " in estimate.limit
    assert placement.devices == {"cpu": 8 * GIB, "cuda:0": GIB}
    assert all(stage.kv.dtype == "bf16" for stage in placement.stages)


def test_a_slow_device_is_left_out_with_the_number() -> None:
    cluster = Cluster((device(), device("cpu:1", bandwidth=1e9)))
    placement = solve(model(), cluster, Workload())
    assert placement.device_names == ("cpu",)
    assert placement.estimate is not None
    assert placement.estimate.limit == "speed of cpu; more memory would not help"
    (note,) = placement.estimate.notes
    assert note.startswith("cpu:1 was left out: with it the best plan takes ")


def test_a_device_too_small_for_one_unit_is_left_out() -> None:
    cluster = Cluster((device(), device("cuda:0", budget=10 * MIB)))
    placement = solve(model(), cluster, Workload())
    assert placement.estimate is not None
    assert placement.estimate.notes == ("cuda:0 was left out: no plan that uses it keeps the budgets",)


def test_an_integrated_gpu_and_the_cpu_share_one_memory() -> None:
    profile = model(layers=8, values=100 * MIB)  # 2 GB of weights in bf16
    devices = (
        device(budget=1200 * MIB, memory_pool="host"),
        device("cuda:0", budget=1200 * MIB, bandwidth=60e9, memory_pool="host", context_bytes=0),
    )
    apart = tuple(replace(place, memory_pool=place.name) for place in devices)
    assert solve(profile, Cluster(apart), Workload(), "bf16").device_names
    with pytest.raises(DoesNotFit) as refusal:
        solve(profile, Cluster(devices), Workload(), "bf16")
    assert sum(refusal.value.shortfall_bytes.values()) > 700 * MIB
    assert solve(profile, Cluster(devices), Workload()).stages[0].weights == "int8"


def test_auto_says_why_a_more_precise_format_was_not_used() -> None:
    cluster = Cluster((device(budget=200 * MIB),))
    placement = solve(model(layers=8, values=10 * MIB), cluster, Workload(context=512))
    assert placement.stages[0].weights == "int8"
    assert placement.estimate is not None
    notes = " | ".join(placement.estimate.notes)
    assert "bf16 was not used: it does not fit, " in notes
    assert " on cpu short" in notes


@pytest.mark.parametrize(
    ("stored", "weights", "expected"),
    [
        ("fp32", "auto", ("fp32", "bf16", "fp16", "int8", "nf4")),
        ("bf16", "auto", ("bf16", "fp16", "int8", "nf4")),
        ("fp16", "auto", ("fp16", "int8", "nf4")),
        ("nf4", "auto", ("nf4",)),
        ("int8", "auto", ("int8",)),
        ("bf16", "fp32", ("fp32",)),  # asked for by name: exact comparison in float32
        ("bf16", "nf4", ("nf4",)),
        ("int8", "int8", ("int8",)),
    ],
)
def test_formats_to_try(stored: str, weights: str, expected: tuple[str, ...]) -> None:
    assert allowed_formats(model(stored_format=stored), weights) == expected


@pytest.mark.parametrize(
    ("stored", "weights", "why"),
    [
        ("nf4", "bf16", "stored as nf4 and cannot be loaded as bf16; use --weights with nf4"),
        ("int8", "nf4", "stored as int8 and cannot be loaded as nf4"),
        ("bf16", "fp8", "'fp8' is not a format; use --weights auto, or one of fp32, bf16"),
    ],
)
def test_formats_refused(stored: str, weights: str, why: str) -> None:
    with pytest.raises(InvalidPlacement, match=why):
        solve(model(stored_format=stored), Cluster((device(),)), Workload(), weights)


def test_a_format_that_one_device_lacks_goes_to_the_other() -> None:
    old_card = device("cuda:0", bandwidth=300e9, formats=("fp32", "fp16"))
    placement = solve(model(), Cluster((device(), old_card)), Workload(), "nf4")
    assert placement.device_names == ("cpu",)
    assert placement.estimate is not None
    assert "cuda:0 was left out: it does not compute nf4" in placement.estimate.notes
    with pytest.raises(DoesNotFit, match="no device computes nf4"):
        solve(model(), Cluster((old_card,)), Workload(), "nf4")


def refusal_of(budget_mib: int, workload: Workload, weights: str = "auto", layers: int = 8) -> DoesNotFit:
    profile = model(layers=layers, values=10 * MIB)
    with pytest.raises(DoesNotFit) as refusal:
        solve(profile, Cluster((device(budget=budget_mib * MIB),)), workload, weights)
    return refusal.value


def advice_of(refusal: DoesNotFit) -> list[str]:
    return str(refusal).split("it fits with ")[1].split(" or ")


def solved_with(advice: str, budget_mib: int, workload: Workload, weights: str) -> Placement:
    words = advice.split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    workload = replace(
        workload,
        context=int(options.get("--context", workload.context)),
        sessions=int(options.get("--sessions", workload.sessions)),
    )
    cluster = Cluster((device(budget=budget_mib * MIB),))
    return solve(model(layers=8, values=10 * MIB), cluster, workload, options.get("--weights", weights))


@pytest.mark.parametrize(
    ("budget_mib", "workload", "weights", "kinds"),
    [
        (150, Workload(context=512), "bf16", ["--weights"]),
        (260, Workload(context=8192), "bf16", ["--weights", "--context"]),
        (260, Workload(context=8192, sessions=4), "int8", ["--context", "--sessions"]),
        (110, Workload(context=8192, sessions=8), "bf16", ["--weights"]),
    ],
)
def test_every_piece_of_advice_fits(budget_mib: int, workload: Workload, weights: str, kinds: list[str]) -> None:
    refusal = refusal_of(budget_mib, workload, weights)
    assert "\n" not in str(refusal)
    assert refusal.shortfall_bytes["cpu"] > 0
    advice = advice_of(refusal)
    assert [piece.split()[0] for piece in advice] == kinds
    for piece in advice:
        solved_with(piece, budget_mib, workload, weights)


def test_the_context_advised_is_the_longest_that_fits() -> None:
    workload = Workload(context=8192)
    (context,) = [piece for piece in advice_of(refusal_of(100, workload, "nf4")) if "--context" in piece]
    longest = int(context.split()[1])
    solved_with(f"--context {longest}", 100, workload, "nf4")
    with pytest.raises(DoesNotFit):
        solved_with(f"--context {longest + workload.block_tokens}", 100, workload, "nf4")


def test_the_shortfall_is_what_is_missing() -> None:
    refusal = refusal_of(60, Workload(context=512))
    assert "nothing smaller fits either" in str(refusal)
    missing = refusal.shortfall_bytes["cpu"]
    profile, workload = model(layers=8, values=10 * MIB), Workload(context=512)
    solve(profile, Cluster((device(budget=60 * MIB + missing),)), workload)
    with pytest.raises(DoesNotFit):
        solve(profile, Cluster((device(budget=60 * MIB + missing - 1),)), workload)


def test_the_shortfall_names_every_device() -> None:
    profile = model(layers=8, values=100 * MIB)
    cluster = Cluster((device(budget=100 * MIB), device("cuda:0", budget=300 * MIB)))
    with pytest.raises(DoesNotFit) as refusal:
        solve(profile, cluster, Workload())
    assert set(refusal.value.shortfall_bytes) == {"cpu", "cuda:0"}


@pytest.mark.parametrize(
    ("devices", "workload", "why"),
    [
        (0, Workload(), "no device to plan for"),
        (9, Workload(), "9 devices are more than the planner searches"),
        (1, Workload(context=65536), "longer than the 32768 tokens .* use --context 32768 or less"),
        (1, Workload(sessions=0), "sessions 0 is not allowed"),
        (1, Workload(context=0), "context 0 is not allowed"),
    ],
)
def test_impossible_requests(devices: int, workload: Workload, why: str) -> None:
    cluster = Cluster(tuple(device(f"cuda:{index}") for index in range(devices)))
    with pytest.raises(InvalidPlacement, match=why):
        solve(model(), cluster, workload)


def test_tied_embeddings_are_paid_once_on_one_device() -> None:
    ends = 200 * MIB
    units = (unit("embed", ends, read=1e-4), unit("layer 0", MIB), unit("head", ends))
    untied = model(units=units)
    tied = replace(untied, tied_bytes=formats_of(ends))
    cluster = Cluster((device(),))
    bills = [placement_memory(p, cluster, solve(p, cluster, Workload(), "bf16"))[0] for p in (untied, tied)]
    assert bills[0].weight_bytes - bills[1].weight_bytes == 2 * ends
