"""Every command that loads a placement refuses one that no longer holds, in one line with the command that mends it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from splitrun.__main__ import main
from splitrun.engine.engine import Engine
from splitrun.errors import MissingWeights
from splitrun.planner.facts import Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec

PLAN = Placement(
    1, ModelRef("demo", layers=8), Workload(context=128), (StageSpec("cpu", True, (0, 8), True, "bf16"),)
)  # fmt: skip
STALE = {
    "other hardware": (replace(PLAN, stages=(replace(PLAN.stages[0], device="cuda:7"),)), "device cuda:7 is not here"),
    "a node that is gone": (
        replace(PLAN, stages=(replace(PLAN.stages[0], device="attic/cpu"),)),
        "device attic/cpu is",
    ),
    "another checkpoint": (replace(PLAN, model=replace(PLAN.model, fingerprint="sha256:" + "0" * 64)), "demo changed"),
    "another size": (
        replace(PLAN, model=replace(PLAN.model, layers=9), stages=(replace(PLAN.stages[0], layers=(0, 9)),)),
        "the placement splits 9 layers, but demo has 8",
    ),
    "too little memory for the process": (replace(PLAN, devices={"cpu": 100 << 20}), "the plan takes at least "),
    "too long a context": (replace(PLAN, workload=Workload(context=50_000)), "context 50000 is longer than"),
    "more memory than there is": (
        replace(PLAN, devices={"cpu": 1 << 50}),
        "of memory, and its budget is 1024 TiB; lower",
    ),
}
COMMANDS = {
    "check": [],
    "run": ["hello"],
    "serve": ["--port", "0"],
    "trace": ["hello"],
    "bench": ["--prompt-tokens", "9"],
}


@pytest.mark.parametrize("reason", STALE)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_stale_placement_is_refused_with_what_mends_it(
    command: str, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    placement, why = STALE[reason]
    file = tmp_path / "mine.yaml"
    placement.save(file)
    assert main([command, str(file), *COMMANDS[command]]) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith(f"splitrun: {file}: ")
    assert error.count("\n") == 1
    assert why in error
    assert "plan again: splitrun plan demo --context " in error
    assert error.endswith(f" --weights bf16 -o {file}\n")


@pytest.mark.parametrize("command", [*COMMANDS, "what-if"])
def test_a_placement_whose_model_is_not_here_is_named(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gone, file = tmp_path / "gone", tmp_path / "mine.yaml"
    replace(PLAN, model=ModelRef(str(gone), layers=8)).save(file)
    assert main([command, str(file), *COMMANDS.get(command, ["--drop", "cuda:0"])]) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error == f"splitrun: {file} names a model that is not here: there is no directory {gone}\n"


def test_an_engine_names_the_placement_whose_model_is_not_here(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    placement = replace(PLAN, model=ModelRef(str(tmp_path / "gone"), layers=8))
    placement.save(file)
    with pytest.raises(MissingWeights, match=r"^the placement names a model that is not here: there is no"):
        Engine(placement)
    with pytest.raises(MissingWeights, match=f"^{re.escape(str(file))} names a model that is not here: there is no"):
        Engine(file)


def test_a_placement_of_another_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    PLAN.save(file)
    file.write_text(file.read_text("utf-8").replace("version: 1", "version: 2"), "utf-8")
    for command, words in COMMANDS.items():
        assert main([command, str(file), *words]) == 2
        assert "version: this splitrun reads version 1; plan again with: splitrun plan" in capsys.readouterr().err
