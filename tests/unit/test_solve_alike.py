"""Devices that are alike: searched as one class, with the answers of a search that tells them apart."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import cast

import pytest
from planner_models import GIB, MIB, device, model, random_cluster, random_model, random_workload

from splitrun.planner import search
from splitrun.planner.alike import Classes, classes_of, sets_of, subsets
from splitrun.planner.facts import FORMATS, Cluster, Link, ModelProfile, Objective, Workload
from splitrun.planner.formats import device_formats
from splitrun.planner.memory import over_budget
from splitrun.planner.problem import Tables
from splitrun.planner.quality import loss_limit
from splitrun.planner.search import fastest, least_excess
from splitrun.planner.solve import solve
from splitrun.planner.tables import build_tables
from splitrun.planner.within import fastest_within


def twins(draw: random.Random, cluster: Cluster) -> Cluster:
    """The cluster with one of its devices there twice, and now and then thrice."""
    devices = list(cluster.devices)
    number = draw.randrange(len(devices))
    devices[number] = replace(devices[number], formats=FORMATS)
    devices += [replace(devices[number], name=f"cuda:{index + 4}") for index in range(draw.choice([1, 1, 2]))]
    return Cluster(tuple(replace(place, memory_pool=place.name) for place in devices))


def instance(seed: int) -> tuple[ModelProfile, Tables, Workload]:
    draw = random.Random(seed)
    profile, cluster, workload = random_model(draw), twins(draw, random_cluster(draw)), random_workload(draw)
    return profile, build_tables(profile, cluster, device_formats(profile, cluster), workload), workload


def told_apart(tables: Tables) -> Classes:
    return tuple((number,) for number in range(tables.devices))


@pytest.mark.parametrize("seed", range(30))
def test_as_good_as_a_search_that_tells_them_apart(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, tables, workload = instance(seed)
    bottleneck, most = workload.objective == "throughput", loss_limit(profile, "0.5")
    found = fastest(tables, bottleneck), fastest_within(tables, profile, bottleneck, most), least_excess(tables)
    assert subsets(classes_of(tables)) < 1 << tables.devices
    monkeypatch.setattr(search, "classes_of", told_apart)
    each = fastest(tables, bottleneck), fastest_within(tables, profile, bottleneck, most), least_excess(tables)
    for ours, wanted in zip(found, each, strict=True):
        assert ours.value == pytest.approx(wanted.value, rel=1e-9)


def test_who_is_alike() -> None:
    cards = [device(f"cuda:{index}") for index in range(5)]
    cards[2] = replace(cards[2], budget_bytes=GIB)
    cards[3] = replace(cards[3], bandwidth_bytes_per_s=1e9)
    cluster = Cluster((device(), *cards), {("cpu", "cuda:4"): Link(1e-3, 1e9)})
    profile = model()
    formats = device_formats(profile, cluster, "bf16")
    assert classes_of(build_tables(profile, cluster, formats, Workload())) == ((0,), (1, 2), (3,), (4,), (5,))
    shared = Cluster(tuple(replace(card, memory_pool="host") for card in cards[:2]))
    assert classes_of(build_tables(profile, shared, formats, Workload())) == ((0,), (1,))


def test_of_devices_that_are_alike_the_first_are_taken() -> None:
    assert sets_of(((0,), (1, 3))) == [
        (0b0001, frozenset({0})),
        (0b0010, frozenset({1})),
        (0b0011, frozenset({0, 1})),
        (0b1010, frozenset({3})),
        (0b1011, frozenset({0, 3})),
    ]


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_sixteen_cards_of_a_kind_are_searched_exactly(objective: str) -> None:
    cards = [device(f"cuda:{index}", budget=2 * GIB, bandwidth=300e9, context_bytes=256 * MIB) for index in range(16)]
    cluster = Cluster((device(budget=4 * GIB), *cards))
    workload = Workload(context=2048, objective=cast(Objective, objective))
    plan = solve(model(layers=48, values=100 * MIB), cluster, workload, "bf16")
    assert plan.estimate is not None
    assert over_budget(plan.estimate.devices) == {}
    assert not any("too different" in note for note in plan.estimate.notes)
    used = [name for name in plan.device_names if name.startswith("cuda")]
    assert sorted(used, key=lambda name: int(name[5:])) == [f"cuda:{index}" for index in range(len(used))]
    assert len(used) == (16 if objective == "throughput" else 7)  # as few as hold it


def test_those_left_out_share_a_sentence() -> None:
    cards = [device(f"cuda:{index}", budget=4 * GIB, bandwidth=300e9) for index in range(4)]
    plan = solve(model(), Cluster((device(), *cards)), Workload(), "bf16")
    assert plan.estimate is not None
    assert plan.device_names == ("cuda:0",)
    (note,) = [note for note in plan.estimate.notes if "cuda:3" in note]
    assert note.startswith("cuda:1 and cuda:2 and cuda:3 were left out; the best plan with one of them: ")
