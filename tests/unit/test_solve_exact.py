"""The solver against brute force: every split, every holder of the ends, every format of devices and their parts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

import pytest
from planner_models import GIB, random_cluster, random_model, random_seconds, random_workload

from splitrun.errors import DoesNotFit
from splitrun.planner.cost import activation_bytes, hop_s, objective_rows, pass_s, score, stage_s
from splitrun.planner.facts import VALUE_BYTES, Cluster, Device, ModelProfile, Workload
from splitrun.planner.formats import allowed_formats, device_formats
from splitrun.planner.memory import (
    DeviceMemory,
    compute_dtype,
    device_memory,
    over_budget,
    placement_memory,
    pool_budgets,
    unit_memory,
)
from splitrun.planner.placement import KVSpec, ModelRef, Placement, StageSpec
from splitrun.planner.quality import loss_limit, placement_loss, unit_loss
from splitrun.planner.solve import solve


def chains(layers: int, devices: tuple[Device, ...]) -> Iterator[list[tuple[Device, int, int]]]:
    """Every way to give all layers to distinct devices, one run each."""
    for count in range(1, min(layers, len(devices)) + 1):
        for order in itertools.permutations(devices, count):
            for cuts in itertools.combinations(range(1, layers), count - 1):
                edges = (0, *cuts, layers)
                yield [(order[i], edges[i], edges[i + 1]) for i in range(count)]


def every_plan(
    profile: ModelProfile, devices: tuple[Device, ...], formats: Mapping[str, tuple[str, ...]], apart: bool
) -> Iterator[tuple[StageSpec, ...]]:
    """Every chain, every holder of the ends, every format of every device; ``apart``: of every part, those of one
    device computing in types of one size."""

    @cache
    def stage(name: str, start: int, stop: int, embed: bool, head: bool, weights: str) -> StageSpec:
        return StageSpec(name, embed, (start, stop), head, weights, KVSpec(compute_dtype(places[name], weights)))

    places = {place.name: place for place in devices}
    n = profile.layers
    for chain in chains(n, devices):
        for first, last in itertools.product(devices, repeat=2):
            parts = [(first.name, 0, 0, True, False)]
            parts += [(place.name, start, stop, False, False) for place, start, stop in chain]
            parts.append((last.name, n, n, False, True))
            for chosen in itertools.product(*(formats[part[0]] for part in parts)):
                kinds: dict[str, object] = {}
                for (name, *_), weights in zip(parts, chosen, strict=True):
                    kind = VALUE_BYTES[compute_dtype(places[name], weights)] if apart else weights
                    if kinds.setdefault(name, kind) != kind:
                        break
                else:
                    yield joined([stage(*part, weights) for part, weights in zip(parts, chosen, strict=True)])


def joined(stages: list[StageSpec]) -> tuple[StageSpec, ...]:
    """The ends in one stage with the layers beside them, where device and format are the same."""
    embed, *runs, head = stages
    ahead, behind = [embed], [head]
    if (embed.device, embed.weights) == (runs[0].device, runs[0].weights):
        runs[0], ahead = joined_stage(embed, runs[0]), []
    if (head.device, head.weights) == (runs[-1].device, runs[-1].weights):
        runs[-1], behind = joined_stage(runs[-1], head), []
    return (*ahead, *runs, *behind)


@cache
def joined_stage(one: StageSpec, other: StageSpec) -> StageSpec:
    layers = other.layers if one.layers[0] == one.layers[1] else one.layers
    return replace(one, embed=one.embed, layers=layers, head=other.head)


class Force:
    """Scores and bytes of placements, stage by stage, each stage counted once."""

    def __init__(self, profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
        self.profile, self.cluster, self.workload = profile, cluster, workload
        self.formats = device_formats(profile, cluster)
        self.stage_s = cache(self._stage_s)
        self.hop_s = cache(self._hop_s)
        self.bytes_of = cache(self._bytes_of)
        self.size_of = cache(lambda name, weights: activation_bytes(profile, cluster.device(name), weights))
        self.pools = pool_budgets(cluster)

    def _stage_s(self, stage: StageSpec) -> float:
        plan = Placement(1, ModelRef("x"), self.workload, (StageSpec("cpu", True, (0, 1), True),))
        prefill = self.workload.objective == "first-token"
        return stage_s(self.profile, self.cluster, plan, stage, prefill, objective_rows(self.workload))

    def _hop_s(self, source: str, target: str, size: int) -> float:
        prefill = self.workload.objective == "first-token"
        return hop_s(self.cluster, source, target, size, self.workload, prefill, objective_rows(self.workload))

    def _bytes_of(self, stages: tuple[StageSpec, ...]) -> DeviceMemory:
        place = self.cluster.device(stages[0].device)
        bills = [
            unit_memory(self.profile, unit, place, stage.weights, self.workload, stage.kv)
            for stage in stages
            for unit in stage.units
        ]
        ends = {stage.weights for stage in stages if stage.embed} & {stage.weights for stage in stages if stage.head}
        shared = sum(self.profile.tied_bytes.get(weights, 0) for weights in ends)
        return device_memory(place, place.budget_bytes, bills, shared)

    def score(self, stages: tuple[StageSpec, ...]) -> float:
        if self.workload.objective == "throughput":
            busy: dict[str, float] = {}
            for stage in stages:
                busy[stage.device] = busy.get(stage.device, 0.0) + self.stage_s(stage)
            return max(busy.values())
        names = [stage.device for stage in stages]
        sizes = [self.size_of(stage.device, stage.weights) for stage in stages[:-1]]
        hops = [(*pair, size) for pair, size in zip(itertools.pairwise(names), sizes, strict=True)]
        return sum(self.stage_s(stage) for stage in stages) + sum(self.hop_s(*hop) for hop in hops)

    def loss(self, stages: tuple[StageSpec, ...]) -> float:
        return sum(unit_loss(self.profile, unit, stage.weights) for stage in stages for unit in stage.units)

    def fits(self, stages: tuple[StageSpec, ...]) -> bool:
        names = dict.fromkeys(stage.device for stage in stages)
        bills = [self.bytes_of(tuple(stage for stage in stages if stage.device == name)) for name in names]
        return not over_budget(bills, self.pools)

    def best(self, most: float | None = None) -> float | None:
        """The best score of all placements that fit, one format per device; or of those that lose no more than
        ``most``, each part in its own."""
        devices = tuple(place for place in self.cluster.devices if self.formats[place.name])
        best = float("inf")
        for stages in every_plan(self.profile, devices, self.formats, most is not None):
            value = self.score(stages)
            if value < best and (most is None or self.loss(stages) <= most) and self.fits(stages):
                best = value
        return None if best == float("inf") else best


def instance(seed: int) -> tuple[ModelProfile, Cluster, Workload]:
    draw = random.Random(seed)
    profile, cluster, workload = random_model(draw), random_cluster(draw), random_workload(draw)
    if draw.random() < 0.5:
        profile = random_seconds(draw, profile, cluster)
    return profile, cluster, workload


@pytest.mark.parametrize("block", range(8))
def test_equals_brute_force(block: int) -> None:
    fitted = refused = mixed = 0
    for seed in range(block * 130, block * 130 + 130):
        profile, cluster, workload = instance(seed)
        force = Force(profile, cluster, workload)
        expected = force.best() or force.best(float("inf"))
        if expected is None:
            with pytest.raises(DoesNotFit):
                solve(profile, cluster, workload)
            refused += 1
            continue
        placement = solve(profile, cluster, workload)
        assert score(profile, cluster, placement) == pytest.approx(expected, rel=1e-9), seed
        assert not over_budget(placement_memory(profile, cluster, placement), pool_budgets(cluster)), seed
        fitted += 1
        mixed += len({stage.weights for stage in placement.stages}) > 1
    assert fitted > 40
    assert refused > 2  # the instances must exercise both answers
    assert mixed > 2


def bare(placement: Placement) -> Placement:
    """Without what is said of other plans."""
    assert placement.estimate is not None
    return replace(placement, estimate=replace(placement.estimate, limit="", notes=()))


@pytest.mark.parametrize("block", range(4))
def test_equals_brute_force_within_a_quality(block: int) -> None:
    bound = apart = 0
    for seed in range(5000 + block * 40, 5000 + block * 40 + 40):
        profile, cluster, workload = instance(seed)
        quality = random.Random(seed).choice(["int8", "0.3", "0.6"])
        most = loss_limit(profile, quality)
        expected = Force(profile, cluster, workload).best(most)
        if expected is None:
            with pytest.raises(DoesNotFit):
                solve(profile, cluster, workload, quality=quality)
            continue
        placement = solve(profile, cluster, workload, quality=quality)
        quickest = solve(profile, cluster, workload)
        if placement_loss(profile, quickest) <= most:
            assert bare(placement) == bare(quickest), seed  # the limit does not bind
            continue
        assert placement_loss(profile, placement) <= loss_limit(profile, quality), seed
        assert score(profile, cluster, placement) == pytest.approx(expected, rel=1e-9), seed
        bound += expected > score(profile, cluster, quickest) * (1 + 1e-9)
        apart += len({(stage.device, stage.weights) for stage in placement.stages}) > len(placement.device_names)
    assert bound > 3  # the limit must have cost something now and then
    assert apart > 2  # and parts of one device in several formats been the best


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
        formats = dict.fromkeys((place.name for place in devices), (weights,))
        reference = ModelRef(profile.source, layers=profile.layers)
        plans = [Placement(1, reference, workload, stages) for stages in every_plan(profile, devices, formats, False)]
        balanced = [
            pass_s(profile, cluster, placement, prefill=False, rows=workload.sessions)
            for placement in plans
            if not over_budget(placement_memory(profile, cluster, placement), pools)
            and score(profile, cluster, placement) <= score(profile, cluster, found) * (1 + 1e-9)
        ]
        seconds = pass_s(profile, cluster, found, prefill=False, rows=workload.sessions)
        assert seconds == pytest.approx(min(balanced), rel=1e-9), seed
