"""More devices than the exact search takes: plans that hold, and bounds that hold."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import cast

import pytest
from planner_models import GIB, MIB, device, model, random_cluster, random_model, random_seconds, random_workload

from splitrun.errors import DoesNotFit
from splitrun.planner.facts import Cluster, Objective, Workload
from splitrun.planner.formats import device_formats
from splitrun.planner.many import fastest_of_many, least_with_layers_on
from splitrun.planner.memory import over_budget
from splitrun.planner.problem import INFINITE
from splitrun.planner.quality import loss_limit, placement_loss
from splitrun.planner.search import fastest
from splitrun.planner.solve import solve
from splitrun.planner.tables import build_tables


@pytest.mark.parametrize("seed", range(150))
def test_between_the_bound_and_the_best(seed: int) -> None:
    draw = random.Random(seed)
    profile, cluster, workload = random_model(draw), random_cluster(draw), random_workload(draw)
    profile = random_seconds(draw, profile, cluster) if seed % 2 else profile
    formats = device_formats(profile, cluster)
    if not any(formats.values()):
        return
    tables = build_tables(profile, cluster, formats, workload)
    bottleneck = workload.objective == "throughput"
    exact = fastest(tables, bottleneck).value
    found, least = fastest_of_many(tables, bottleneck)
    assert least <= exact * (1 + 1e-9)
    assert found.value >= exact * (1 - 1e-9)
    if found.split is None:
        assert found.value == INFINITE


@pytest.mark.parametrize("seed", range(150))
def test_no_plan_with_layers_on_some_devices_beats_their_bound(seed: int) -> None:
    draw = random.Random(seed)
    profile, cluster, workload = random_model(draw), random_cluster(draw), random_workload(draw)
    profile = random_seconds(draw, profile, cluster) if seed % 2 else profile
    named = {name: found for name, found in device_formats(profile, cluster).items() if found}
    if not named:
        return
    able = draw.sample(sorted(named), draw.randint(1, len(named)))
    bottleneck = workload.objective == "throughput"
    numbers = [number for number, name in enumerate(named) if name in able]
    least = least_with_layers_on(build_tables(profile, cluster, named, workload), numbers, bottleneck)
    cluster = replace(
        cluster, devices=tuple(replace(place, holds_layers=place.name in able) for place in cluster.devices)
    )
    found = fastest(build_tables(profile, cluster, named, workload), bottleneck).value
    assert 0 < least <= found * (1 + 1e-9)
    assert least_with_layers_on(build_tables(profile, cluster, named, workload), [], bottleneck) == INFINITE


def machines(count: int) -> Cluster:
    cards = [device(f"cuda:{index}", budget=(1 + index % 3) * GIB, bandwidth=(200 + 50 * (index % 4)) * 1e9,
                    context_bytes=256 * MIB) for index in range(count - 1)]  # fmt: skip
    return Cluster((device(budget=4 * GIB), *cards))


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_sixteen_devices(objective: str) -> None:
    profile = model(layers=60, values=100 * MIB)
    workload = Workload(context=2048, objective=cast(Objective, objective))
    start = time.perf_counter()
    plan = solve(profile, machines(16), workload, "bf16")
    assert time.perf_counter() - start < 60
    assert plan.estimate is not None
    assert over_budget(plan.estimate.devices) == {}
    assert len(plan.device_names) >= 8
    (note,) = plan.estimate.notes
    assert "16 devices are too many, and too different, to be searched exactly" in note
    assert float(note.rsplit("at most ", 1)[1].split("%")[0]) < 25


def test_too_much_for_many() -> None:
    with pytest.raises(DoesNotFit, match="short"):
        solve(model(layers=100, values=800 * MIB), machines(12), Workload(), "bf16")


def test_many_keep_the_quality_or_say_what_they_lose() -> None:
    profile = model(layers=12, values=100 * MIB)
    plan = solve(profile, machines(10), Workload(context=2048), quality="int8")
    assert plan.estimate is not None
    assert placement_loss(profile, plan) <= loss_limit(profile, "int8")
    assert "at most" in plan.estimate.notes[0]
    small = Cluster(tuple(device(f"cuda:{index}", budget=500 * MIB, context_bytes=256 * MIB) for index in range(10)))
    with pytest.raises(DoesNotFit, match=r"no plan within --quality bf16 fits; .* loses 100%"):
        solve(profile, small, Workload(context=512), quality="bf16")


def test_cards_without_room_for_layers_leave_the_bound_a_number() -> None:
    cards = [
        device(f"cuda:{n}", budget=(1 + n % 3) * GIB, bandwidth=(200 + 50 * (n % 4) + n) * 1e9, context_bytes=256 * MIB)
        for n in range(11)
    ]
    host = device(budget=12 * GIB)
    cluster = Cluster((host, *cards), card_process_bytes=500 * MIB, card_layers_bytes=100 * MIB)
    found = solve(model(layers=30, values=100 * MIB), cluster, Workload(context=2048), "bf16")
    assert found.estimate is not None
    assert "% from the best" in found.estimate.notes[0]
