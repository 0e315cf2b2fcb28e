"""A run that calibrates: kept where it was undisturbed, and where others took the processors not."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import pytest
from planner_models import device, model

from splitrun.bench import calibrate as module
from splitrun.bench import contest
from splitrun.bench.calibrate import calibrate
from splitrun.bench.terms import Result, Terms
from splitrun.errors import InvalidPlacement
from splitrun.measure import others
from splitrun.measure.others import Disturbance, machine_busy_s, own_s
from splitrun.planner.estimate import Estimate
from splitrun.planner.facts import Cluster, Factor, Workload
from splitrun.planner.placement import Placement
from splitrun.planner.solve import solve

SECONDS = "import time\nuntil = time.process_time() + 0.3\nwhile time.process_time() < until: pass"


def calibrated(
    monkeypatch: pytest.MonkeyPatch, plan: Placement, predicted: Estimate, result: Result, share: float = 0.0
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The lines and what was kept (model, device, format, ratios) of a run with that prediction and that result, of
    whose processor time others took a share."""
    kept: list[tuple[Any, ...]] = []

    def predict(process: Executor, placement: Placement, terms: Terms) -> Estimate:
        return predicted

    def fold(cache: object, model: str, places: Any, ratio: Factor) -> list[Factor]:
        rounded = round(ratio.decode, 6), round(ratio.prefill, 6)
        kept.extend((model, place.name, weights, *rounded) for place, weights in places)
        return [ratio] * len(places)

    terms = Terms("splitrun", "x", "x", 192, 32, 1, "weights", {}, 100)
    monkeypatch.setattr(contest, "make_terms", lambda *arguments: terms)
    monkeypatch.setattr(contest, "predict_in", predict)
    monkeypatch.setattr(contest, "hold", lambda *arguments: [result])
    monkeypatch.setattr(module, "fold", fold)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(module.time, "monotonic", iter((0.0, 1.0)).__next__)
    monkeypatch.setattr(Disturbance, "seconds", lambda self: share)
    return calibrate(plan, "weights"), kept


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_a_disturbed_run_told_is_not_kept(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = solve(replace(model(), fingerprint="sha256:abc"), Cluster((device(),)), Workload(context=256), "nf4")
    predicted = plan.estimate
    assert predicted is not None
    # A run that takes twice as long as predicted.
    twice_s = 2 * predicted.time_to_first_token_s
    result = Result("splitrun", 192, 32, decode_tokens_per_s=predicted.decode_tokens_per_s / 2, ttft_s=twice_s)
    lines, kept = calibrated(monkeypatch, plan, predicted, result, share)
    if share:
        assert kept == []
        assert lines[-1].startswith("nothing is kept: others took 50% of the processors meanwhile")
    else:
        assert kept == [("sha256:abc", "cpu", "nf4", 2.0, 2.0)]
        assert "2.00 decoding" in lines[-1]


def test_devices_learn_only_what_stages_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest was measured apart."""
    plan = solve(model(), Cluster((device(),)), Workload(context=256), "nf4")
    assert plan.estimate is not None
    (whole,) = plan.stages
    second = replace(whole, embed=False, device="cpu:1")
    plan = replace(plan, stages=(replace(whole, head=False, layers=(0, 0)), second))
    stages = (replace(plan.estimate.stages[0], decode_s=0.03, prefill_s=0.05),)
    predicted = replace(plan.estimate, stages=stages, step_s=0.04, time_to_first_token_s=0.1)
    result = Result("splitrun", 192, 32, decode_tokens_per_s=1 / 0.07, ttft_s=0.15)
    lines, kept = calibrated(monkeypatch, plan, predicted, result)
    assert kept == [(plan.model.fingerprint, name, "nf4", 2.0, 2.0) for name in ("cpu", "cpu:1")]
    told = "2.00 decoding, 2.00 for prompts"
    assert lines[-2:] == [f"kept         nf4 on cpu: {told}", f"kept         nf4 on cpu:1: {told}"]


def test_a_plan_over_several_machines_is_not_run() -> None:
    plan = solve(model(), Cluster((device(),)), Workload(context=256), "nf4")
    far = replace(plan, stages=tuple(replace(stage, device="old-pc/cpu") for stage in plan.stages))
    with pytest.raises(InvalidPlacement, match=r"this one has stages on old-pc/cpu: leave it out"):
        calibrate(far, "weights")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counted in /proc alone")
def test_what_ours_and_others_take_is_told_apart() -> None:
    before, own = machine_busy_s(), own_s()
    subprocess.run([sys.executable, "-c", SECONDS], check=True)
    assert machine_busy_s() - before > 0.25
    assert own_s() - own > 0.25
    with subprocess.Popen([sys.executable, "-c", SECONDS + "\ninput()"], stdin=subprocess.PIPE) as running:
        theirs = Disturbance()
        named = Disturbance([running.pid])
        assert running.stdin is not None
        while others.own_s([running.pid]) - own_s() < 0.2:  # clock ticks are rounded down: not all of the 0.3
            time.sleep(0.01)
        assert theirs.seconds() > named.seconds() + 0.1
        running.stdin.write(b"\n")


def test_where_nobody_counts_nobody_disturbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others.Path, "read_text", lambda *arguments: "")
    assert machine_busy_s() == 0
    assert Disturbance().seconds() == 0
