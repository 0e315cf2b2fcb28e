"""The placements that are shipped: made by the script beside them, valid, and within their budgets."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from splitrun.planner.memory import over_budget
from splitrun.planner.placement import Placement

ROOT = Path(__file__).parents[2]
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "examples" / "make_placements.py"))
READY = {ready.name: ready for ready in SCRIPT["ready_placements"]()}


def test_every_file_has_its_recipe() -> None:
    assert {file.stem for file in (ROOT / "placements").glob("*.yaml")} == set(READY)


@pytest.mark.parametrize("name", sorted(READY))
def test_a_ready_placement(name: str) -> None:
    file = ROOT / "placements" / f"{name}.yaml"
    text = file.read_text("utf-8")
    assert text == SCRIPT["text_of"](READY[name]), "run: python examples/make_placements.py"
    assert [line.split(":")[0] for line in text.splitlines()[:3]] == ["# hardware", "# command", "# predicted"]
    placement = Placement.load(file)
    assert placement.estimate is not None
    assert over_budget(placement.estimate.devices) == {}
    assert placement.model.source in READY[name].command
    assert set(placement.device_names) <= set(placement.devices)


def test_the_plan_in_the_readme_is_that_of_the_file() -> None:
    shown = Placement.load(ROOT / "placements" / "deepseek-1.5b-4gib-card.yaml").explain()
    assert f"```\n{shown.rstrip()}\n```" in (ROOT / "README.md").read_text("utf-8")


def test_what_they_show() -> None:
    plans = {name: Placement.load(ROOT / "placements" / f"{name}.yaml") for name in READY}
    assert plans["demo-cpu"].device_names == ("cpu",)
    assert set(plans["demo-two-cpus"].device_names) == {"cpu", "cpu:1"}
    assert set(plans["deepseek-1.5b-4gib-card"].device_names) == {"cpu", "cuda:0"}
    assert plans["rtx-3050-4gb-nf4"].device_names == ("cuda:0",)
    assert plans["i7-uhd-630-hybrid"].stages[-1].device == "xpu:0"
    assert set(plans["8b-4gb-card"].device_names) == {"cpu", "cuda:0"}
    assert any("/" in name for name in plans["8b-three-node-lan"].device_names)
    assert plans["8b-two-6gb-cards"].layers == 32
    for name in set(READY) - {"demo-cpu", "demo-two-cpus"}:
        estimate = plans[name].estimate
        assert estimate is not None
        assert estimate.spread == pytest.approx(0.4), name  # from data sheets, so the interval is wide
