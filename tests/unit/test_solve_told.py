"""What a plan says of other plans: each keeps the precision that was asked for."""

from __future__ import annotations

import contextlib
import random
import re
from dataclasses import replace

import pytest
from planner_models import GIB, MIB, device, model, random_cluster, random_model, random_workload

from splitrun.errors import DoesNotFit, InvalidPlacement
from splitrun.planner.cost import score
from splitrun.planner.estimate import Estimate
from splitrun.planner.facts import Cluster, Device, Workload
from splitrun.planner.placement import Placement
from splitrun.planner.quality import loss_limit, unit_loss
from splitrun.planner.solve import solve
from splitrun.quantities import format_rate

PROFILE = model(values=100 * MIB)
LOSSLESS = "0"


def planned(*devices: Device) -> tuple[Placement, Estimate]:
    plan = solve(PROFILE, Cluster(devices), Workload(), quality=LOSSLESS)
    assert {stage.weights for stage in plan.stages} == {"bf16"}
    assert plan.estimate is not None
    return plan, plan.estimate


def test_the_runner_up_keeps_the_quality() -> None:
    """The card takes all, in bf16 alone; a processor without it would be fastest in nf4, which loses too much."""
    cpu, card = device(), device("cuda:0", budget=4 * GIB, bandwidth=300e9, formats=("bf16",))
    plan, estimate = planned(cpu, card)
    assert plan.device_names == ("cuda:0",)
    rate = format_rate(planned(cpu)[1].decode_tokens_per_s).removesuffix(" tok/s")
    (note,) = (note for note in estimate.notes if note.startswith("the best plan without"))
    assert note.startswith(f"the best plan without cuda:0: {rate} instead of ")


def test_what_more_memory_would_give_keeps_the_quality() -> None:
    """The card has no room for a layer in any format; with room it would be fastest in nf4."""
    cpu, card = device(formats=("bf16",)), device("cuda:0", budget=300 * MIB, bandwidth=300e9)
    plan, estimate = planned(cpu, card)
    assert plan.device_names == ("cpu",)
    ample = device("cuda:0", budget=8 * GIB, bandwidth=300e9)
    rate = format_rate(planned(cpu, ample)[1].decode_tokens_per_s).removesuffix(" tok/s")
    assert f"more there would give {rate} instead of " in estimate.limit


@pytest.mark.parametrize(("quality", "told"), [(LOSSLESS, False), ("1", True)])
def test_the_other_format_keeps_the_quality(quality: str, told: bool) -> None:
    """Of one device the runner-up is another format, where any other loses no more than is allowed."""
    cpu = device(formats=("bf16", "int8", "nf4"))
    estimate = solve(PROFILE, Cluster((cpu,)), Workload(), quality=quality).estimate
    assert estimate is not None
    named = [note for note in estimate.notes if note.startswith("the runner-up has weights in")]
    assert bool(named) == told


@pytest.mark.parametrize("block", range(4))
def test_the_runner_up_is_the_best_plan_without_a_device(block: int) -> None:
    """Within the quality, parts of a device in formats of their own where that is what keeps it."""
    told = 0
    for seed in range(block * 100, block * 100 + 100):
        draw = random.Random(seed)
        profile, cluster, workload = random_model(draw), random_cluster(draw), random_workload(draw)
        cluster = replace(cluster, devices=tuple(replace(each, memory_pool=each.name) for each in cluster.devices))
        quality = draw.choice(["0", "int8", "0.4"])
        try:
            plan = solve(profile, cluster, workload, quality=quality)
        except DoesNotFit:
            continue
        assert plan.estimate is not None
        if plan.estimate.limit.startswith("--quality"):
            continue  # the limit itself is what there is to tell
        values = {}
        for name in plan.device_names:
            with contextlib.suppress(DoesNotFit, InvalidPlacement):
                without = cluster.without([name])
                values[name] = score(profile, without, solve(profile, without, workload, quality=quality))
        notes = "\n".join(plan.estimate.notes)
        named = re.search(r"the best plan without (\S+): ", notes)
        assert bool(named) == bool(values), seed
        if named:
            assert values[named[1]] == pytest.approx(min(values.values()), rel=1e-9), seed
            told += 1
    assert told > 10


def test_nothing_is_said_of_lossy_plans_with_a_device_that_is_left_out() -> None:
    """The processor computes nf4 alone, which loses too much."""
    cpu, card = device(formats=("nf4",)), device("cuda:0", budget=4 * GIB, bandwidth=300e9, formats=("bf16",))
    _, estimate = planned(cpu, card)
    assert "cpu was left out: it would gain nothing" in estimate.notes


@pytest.mark.parametrize("quality", ["fp32", "bf16", "0"])
def test_all_in_the_checkpoint_s_own_format_loses_nothing(quality: str) -> None:
    """So a plan that may lose as much has no part in a leaner one."""
    card = device("cuda:0", budget=4 * GIB, bandwidth=300e9)
    plan = solve(PROFILE, Cluster((device(), card)), Workload(), quality=quality)
    assert {stage.weights for stage in plan.stages} == {"bf16"}
    stored = replace(PROFILE, stored_format="fp32")
    assert loss_limit(stored, "bf16") == pytest.approx(sum(unit_loss(stored, unit, "bf16") for unit in range(10)))
