"""Budgets that are hopeless by weights and KV alone are refused before anything is measured."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from planner_models import GIB, MIB, device, model

import splitrun
from splitrun.errors import DoesNotFit, InvalidPlacement
from splitrun.measure import gather
from splitrun.planner.facts import Cluster, Workload
from splitrun.planner.formats import allowed_formats
from splitrun.planner.refuse import fits, refuse_hopeless
from splitrun.planner.solve import solve
from splitrun.quantities import format_bytes


def refused(cluster: Cluster, workload: Workload, weights: str = "auto") -> DoesNotFit | None:
    profile = model()
    try:
        refuse_hopeless(profile, cluster, workload, allowed_formats(profile, weights))
    except DoesNotFit as error:
        return error
    return None


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_what_is_refused_has_no_plan(kv: str) -> None:
    draw, outcomes = random.Random(0), []
    for _ in range(150):
        names = draw.choice((("cpu",), ("cpu", "cuda:0"), ("cpu", "cpu:1")))
        taken = draw.choice((0, 60 * MIB))
        sizes = {name: draw.randrange(1, 200) * MIB for name in names}
        devices = tuple(device(name, budget=size, context_bytes=taken) for name, size in sizes.items())
        cluster = Cluster(devices).keeping(kv)
        workload = Workload(context=draw.choice((64, 4096, 32768)), sessions=draw.choice((1, 8)))
        weights = draw.choice(("auto", "bf16", "nf4"))
        error = refused(cluster, workload, weights)
        outcomes.append(error is not None)
        if error is None:
            continue
        missing = sum(error.shortfall_bytes.values())
        assert missing > 0
        with pytest.raises(DoesNotFit) as caught:
            solve(model(), cluster, workload, weights)
        assert sum(caught.value.shortfall_bytes.values()) >= missing
    assert 20 < sum(outcomes) < 130


def test_devices_that_share_memory_are_counted_once() -> None:
    cpu, card = device(budget=60 * MIB), device("cuda:0", budget=60 * MIB, context_bytes=0)
    workload = Workload(context=64)
    assert refused(Cluster((cpu, card)), workload, "int8") is None
    assert refused(Cluster((cpu, replace(card, memory_pool=cpu.memory_pool))), workload, "int8") is not None


def test_what_the_process_takes_is_no_room() -> None:
    workload, needed = Workload(context=64), 57 * MIB  # 100 MiB of values in nf4, and KV
    assert refused(Cluster((device(budget=needed + 40 * MIB, context_bytes=40 * MIB),)), workload) is None
    error = refused(Cluster((device(budget=needed + 38 * MIB, context_bytes=40 * MIB),)), workload)
    assert error is not None
    assert "95.0 MiB on cpu, where process and context take 40.0 MiB: at least" in str(error)
    error = refused(Cluster((device(budget=30 * MIB, context_bytes=40 * MIB),)), workload)
    assert error is not None
    assert needed + 5 * MIB < error.shortfall_bytes["cpu"] < needed + 10 * MIB  # of the process, 10 MiB are missing too


@pytest.mark.parametrize(("budgets", "room"), [((30, 20), -10), ((60, 30), 20), ((60, 50), 30)])
def test_of_two_memories_those_with_room_count(budgets: tuple[int, int], room: int) -> None:
    devices = [
        device(name, budget=size * MIB, context_bytes=40 * MIB)
        for name, size in zip(("cpu", "cuda:0"), budgets, strict=True)
    ]
    workload = Workload(context=64)
    error, alone = refused(Cluster(tuple(devices)), workload), refused(Cluster((device(budget=MIB),)), workload)
    assert error is not None
    assert alone is not None
    missing, needed = (sum(each.shortfall_bytes.values()) for each in (error, alone))
    assert missing == needed + MIB - room * MIB
    assert "where process and context take 80.0 MiB: at least" in str(error)


def test_what_embed_and_head_share_is_there_in_one_format() -> None:
    """Not in the dearest one while both are in the leanest."""
    profile = model(values=8 * MIB)
    ends = {name: profile.units[0].weight_bytes[name] for name in ("bf16", "nf4")}
    profile = replace(profile, tied_bytes=ends)
    layers = sum(unit.weight_bytes["nf4"] for unit in profile.units[1:-1])
    with pytest.raises(DoesNotFit) as caught:
        refuse_hopeless(profile, Cluster((device(budget=MIB),)), Workload(context=64), ("bf16", "nf4"))
    head = profile.units[-1].weight_bytes["nf4"]
    assert f"in nf4 its weights alone take {format_bytes(layers + head)} and its KV" in str(caught.value)


@pytest.mark.parametrize(
    ("budget", "context", "weights", "advice"),
    [
        (30, 64, "auto", "; give it more with --memory, or take a smaller model"),
        (90, 64, "int8", "take --weights nf4, give it more"),
        (70, 32768, "nf4", "; lower --context 32768, give it more"),
    ],
)
def test_a_hopeless_budget_says_what_would_mend_it(budget: int, context: int, weights: str, advice: str) -> None:
    error = refused(Cluster((device(budget=budget * MIB),)), Workload(context=context), weights)
    assert error is not None
    assert advice in str(error)
    assert "\n" not in str(error)


def test_nothing_is_timed_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPLITRUN_CACHE", str(tmp_path))
    monkeypatch.setattr(gather, "measure", lambda *arguments: pytest.fail("timed"))
    with pytest.raises(DoesNotFit, match=r"its weights alone take .*, and the budgets are 1.00 MiB on cpu"):
        splitrun.plan("demo", memory={"cpu": "1MiB"})
    with pytest.raises(InvalidPlacement, match="is longer than"):
        splitrun.plan("demo", context=1 << 20)


def test_the_order_of_devices_changes_no_answer() -> None:
    units = tuple(replace(unit, kv_heads=16) for unit in model(layers=32, values=MIB).units)
    profile, workload = replace(model(layers=32, values=MIB), units=units), Workload(context=6144)
    devices = device(budget=3 * GIB, kv_dtype="int8"), device("cuda:0", budget=GIB // 2)
    solve(profile, Cluster(devices), workload, "bf16")
    assert all(fits(profile, Cluster(each), workload, "bf16") for each in (devices, devices[::-1]))
