"""The planner's commands and flags: what each prints, saves and refuses, on the demo and on data-sheet machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splitrun.__main__ import main
from splitrun.measure import gather, timing
from splitrun.planner.placement import Placement

MACHINE = ("--machine", "desktop DDR4 CPU")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few runs, and the hook for unexpected errors as it was."""
    monkeypatch.setattr(timing, "POINT_SECONDS", 0.0)
    before = sys.excepthook
    yield
    sys.excepthook = before


def test_a_profile_is_saved_and_planned_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture, plan = tmp_path / "facts.json", tmp_path / "plan.svg", tmp_path / "plan.yaml"
    assert main(["profile", "demo", "--memory", "cpu=1GiB", "--weights", "bf16", "--facts", str(file)]) == 0
    out = capsys.readouterr().out
    assert "cpu, bf16" in out
    assert f"splitrun plan demo --facts {file}" in out
    words = ["plan", "demo", "--facts", str(file), "--weights", "bf16", "--context", "256"]
    assert main([*words, "--explain", "--svg", str(picture), "-o", str(plan)]) == 0
    out = capsys.readouterr().out
    assert "t = Σ stages + Σ hops + engine" in out
    assert picture.read_text("utf-8").startswith("<svg ")
    assert Placement.load(plan).estimate is not None
    assert main(["check", str(plan)]) == 0
    assert "suits the model and this machine" in capsys.readouterr().out
    changed = plan.read_text("utf-8").replace("source: demo", f"source: {tmp_path}")
    plan.write_text(changed, "utf-8")
    assert main(["check", str(plan)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_if_adds_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.yaml"
    words = ["what-if", "demo", *MACHINE, "--add", "RTX 3060 12GB", "--context", "512"]
    assert main([*words, "-o", str(file), "--svg", str(tmp_path / "plan.svg"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["workload"]["context"] == 512
    assert Placement.load(file).device_names == ("cuda:0",)
    assert main(["what-if", str(file), *MACHINE, "--context", "1024"]) == 0
    assert "1 session of 1,024 tokens" in capsys.readouterr().out
    assert main(["what-if", str(file), *MACHINE, "--sessions", "3", "--objective", "throughput"]) == 0
    assert "3 sessions of 512 tokens · planned for throughput" in capsys.readouterr().out


TWO_STAGES = """
version: 1
model: {source: demo}
workload: {context: 256}
stages:
  - {device: cpu, units: [embed], layers: [0, 4], weights: int8, kv: {dtype: int8}}
  - {device: "cpu:1", units: [head], layers: [4, 8], weights: int8, kv: {dtype: int8}}
devices: {cpu: {memory: 700MiB}, "cpu:1": {memory: 800MiB}}
"""


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_if_foretells_sessions_as_a_plan_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of a step share its weights: four sessions are not four times one."""
    words = ["demo", "--memory", "cpu=1GiB", "--context", "256", "--weights", "int8", "--sessions", "4"]
    plan, answer = (planned(capsys, command, *words)["estimate"] for command in ("plan", "what-if"))
    assert answer["throughput_tokens_per_s"] == plan["throughput_tokens_per_s"]


def test_what_if_starts_from_what_the_placement_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "plan.yaml")
    Path(file).write_text(TWO_STAGES, "utf-8")
    (only,) = planned(capsys, "what-if", file, "--drop", "cpu:1")["devices"].items()
    assert only == ("cpu", {"memory": "700MiB"})
    plan = planned(capsys, "what-if", file, "--context", "128")
    assert {stage["weights"] for stage in plan["stages"]} == {"int8"}
    assert {stage["kv"]["dtype"] for stage in plan["stages"]} == {"int8"}
    said = ["--kv", "auto", "--quality", "nf4"]  # as by default, but said
    assert {stage["kv"]["dtype"] for stage in planned(capsys, "what-if", file, *MACHINE, *said)["stages"]} == {"bf16"}
    assert planned(capsys, "what-if", file, *MACHINE)["devices"] != plan["devices"]  # of another machine, all it has
    assert planned(capsys, "what-if", file, "--memory", "cpu=900MiB")["devices"] == {"cpu": {"memory": "900MiB"}}
    assert {stage["weights"] for stage in planned(capsys, "what-if", file, "--weights", "nf4")["stages"]} == {"nf4"}


def test_a_placement_for_a_card_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is here is planned for; a card that is added has no budget but its own."""
    text = TWO_STAGES.replace("cpu:1", "cuda:7").replace(
        "layers: [4, 8], weights: int8, kv: {dtype: int8}", "layers: [4, 8]"
    )
    file = tmp_path / "plan.yaml"
    file.write_text(text, "utf-8")
    plan = planned(capsys, "what-if", str(file))
    assert plan["devices"] == {"cpu": {"memory": "700MiB"}}
    assert "this machine has no cuda:7, which the placement uses" in plan["estimate"]["notes"]
    file.write_text(text.replace("cuda:7", "cuda:0"), "utf-8")
    plan = planned(capsys, "what-if", str(file), "--drop", "cpu", "--add", "RTX 3060 12GB")
    (budget,) = plan["devices"].values()
    assert budget != {"memory": "800MiB"}  # nor is int8 for K and V, which no processor is there to keep


def test_what_if_keeps_as_much_precision_as_a_mixed_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "plan.yaml")
    words = [*MACHINE, "--context", "256", "--quality", "0.4"]
    before = {stage["weights"] for stage in planned(capsys, "what-if", "demo", *words, "-o", file)["stages"]}
    assert len(before) > 1
    assert {stage["weights"] for stage in planned(capsys, "what-if", file, *MACHINE)["stages"]} == before


def test_budgets_of_devices_that_are_added(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["what-if", "demo", *MACHINE, "--add", "RTX 3060 12GB", "--context", "256"]
    plan = planned(capsys, *words, "--memory", "cpu=1GiB,cuda:0=1500MiB")
    assert plan["devices"]["cuda:0"] == {"memory": "1500MiB"}
    assert planned(capsys, *words, "--memory", "cuda:0=1500MiB")["devices"] == {"cuda:0": {"memory": "1500MiB"}}
    assert main([*words, "--memory", "cuda:1=1GiB"]) == 2
    assert "--memory: desktop DDR4 CPU, changed, has no 'cuda:1': did you mean cuda:0?" in capsys.readouterr().err


def test_facts_with_keys_and_values_in_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "facts.json")
    words = ["profile", "demo", "--memory", "cpu=1GiB", "--weights", "int8", "--facts", file]
    assert main(words) == 0
    assert main(["plan", "demo", "--facts", file, "--context", "256", "--kv", "int8"]) == 2
    again = "for others make it again with: splitrun profile demo"
    told = capsys.readouterr().err
    assert f"was measured with keys and values in 16 bits; {again} --kv int8 --facts {file}" in told
    assert main([*words, "--kv", "int8"]) == 0
    assert f"plan with it: splitrun plan demo --kv int8 --facts {file}" in capsys.readouterr().out
    assert main(["plan", "demo", "--facts", file, "--context", "256", "--kv", "int8"]) == 0
    assert main(["plan", "demo", "--facts", file, "--context", "256"]) == 2
    told = capsys.readouterr().err
    assert f"in int8, which --kv int8 plans with; {again} --facts {file}" in told


def test_int8_keys_and_values_take_less(capsys: pytest.CaptureFixture[str]) -> None:
    stages = []
    for words in ([], ["--kv", "int8"]):
        assert main(["what-if", "demo", *MACHINE, "--context", "4096", "--json", *words]) == 0
        stages += json.loads(capsys.readouterr().out)["stages"]
    assert [stage["kv"]["dtype"] for stage in stages] == ["bf16", "int8"]


def test_what_if_warns_of_what_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["what-if", "demo", *MACHINE, "--add", "UHD 630", "--weights", "int8"]) == 0
    assert "torch does not compute on it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["what-if", "demo", *MACHINE, "--add", "GTX 1066"], "--add 'GTX 1066' is not known; did you mean"),
        (["what-if", "demo", *MACHINE, "--add-node", "GTX 1066"], "--add-node 'GTX 1066' is not known"),
        (["what-if", "demo", *MACHINE, "--link", "string"], "--link 'string' is not known"),
        (["what-if", "demo", "--machine", "toaster"], "--machine 'toaster' is not known; known: desktop DDR4 CPU, "),
        (["plan", "demo", "-o", "plan.txt"], "by its ending: name it plan.yaml"),
        (["plan", "demo", "-o", "p.yaml", "--svg", "p.yaml"], "-o and --svg both name p.yaml"),
        (["what-if", "demo", *MACHINE, "--drop", "cuda:1"], "--drop: there is no 'cuda:1': there is cpu"),
        (["what-if", "demo", *MACHINE, "--facts", "x.json"], "--machine and --facts both say where to start"),
        (["what-if", "demo", *MACHINE, "--memory", "cpu=0"], "a budget of 0 for cpu"),
        (["what-if", "demo", *MACHINE, "--memory", "cuda:0=4GiB"], "changed, has no 'cuda:0': there is cpu"),
        (["what-if", "demo", "--weights", "int8", "--quality", "bf16"], "--weights int8 leaves no choice"),
        (
            ["what-if", "demo", *MACHINE, "--add", "RTX 3060 12GB", "--memory", "cuda:0=320MiB"],
            "main memory is not used: name cpu in --memory too",
        ),
        (["what-if", "demo", *MACHINE, "--memory", "cpu=1MiB"], "demo does not fit"),
        (["what-if", "demo", *MACHINE, "--quality", "good"], "--quality good is neither a weight format"),
        (["what-if", "demo", *MACHINE, "--context", "9999999"], "context 9999999 is longer than"),
        (["what-if", "demo", *MACHINE, "--add", "GTX 1060 3GB", "--drop", "cpu", "--kv", "int8"], "--kv int8 is for"),
        (["what-if", "nothere.yaml", *MACHINE], "no such file"),
        (["plan", "demo", "--facts", "nothere.json"], "no such file; make one with: splitrun profile MODEL --facts"),
        (["plan", "demo", "--facts", "x.json", "--no-cache"], "--no-cache measures this machine and --facts"),
        (["plan", "demo", "--facts", "x.json", "--nodes"], "--nodes measures machines that are here and --facts"),
        (["plan", "demo", "--weights", "int8", "--quality", "bf16"], "--weights int8 leaves no choice"),
        (["plan", "demo", "--json", "--explain"], "--explain tells a person and --json a program; give one of them"),
        (["plan", "demo", "--weights", "q4"], "Invalid value for '--weights': 'q4' is not one of 'auto', 'fp32'"),
        (["plan", "demo", "--memory", "cpu=-1GiB"], "'-1GiB' is not a size; write it like 4GiB"),
        (["check", "demo"], "demo is no placement file"),
        (["check", "nothere.yaml"], "no such file"),
        (
            ["plan", "mine.yaml"],
            "which is planned already: name its model, or compare it with this machine: splitrun ch",
        ),
        (["profile", "mine.yaml"], "which is planned already"),
        (["profile", "./nowhere"], "there is no directory ./nowhere"),
    ],
)
def test_refusals_are_one_line(words: list[str], why: str, capsys: Any) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--add", "GTX 1066"], "--add 'GTX 1066' is not known"),
        (["--drop", "cuda:7"], "--drop: there is no 'cuda:7'"),
        (["--drop", "cpu"], "no device is left"),
        (["--memory", "cpu=1GiB,cuda:7=1GiB"], "--memory: this machine, changed, has no 'cuda:7'"),
        (["--drop", "cpu", "--add", "RTX 3060 12GB", "--kv", "int8"], "--kv int8 is for processors"),
        (["--context", "9999999"], "is longer than"),
        (["--memory", "cpu=3MB"], "does not fit"),
    ],
)
def test_names_are_looked_up_before_anything_is_timed(
    words: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gather, "measure", lambda *arguments: pytest.fail("timed"))
    assert main(["what-if", "demo", *words]) == 2
    assert why in capsys.readouterr().err


def test_facts_of_another_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from splitrun.api import gather_facts
    from splitrun.planner.facts_file import write_facts

    file = tmp_path / "facts.json"
    write_facts(gather_facts("demo", {"cpu": "1GiB"}, "bf16", rows=(1,)), file)
    assert main(["plan", "other/model", "--facts", str(file)]) == 2
    assert "describes demo, not other/model" in capsys.readouterr().err
