"""What a run told about predictions: folded, kept, applied, told, and forgotten."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from planner_models import device, model

from splitrun.measure.cache import Cache
from splitrun.measure.calibration import MOST, calibrated, factor, fold, forget
from splitrun.measure.probe import this_machine
from splitrun.planner.facts import Cluster, Factor, Workload
from splitrun.planner.facts_file import Facts, read_facts, write_facts
from splitrun.planner.seconds import DecodeLine, DeviceSeconds, UnitSeconds
from splitrun.planner.solve import solve

CPU = device()
CLUSTER = Cluster((CPU,))
UNIT = UnitSeconds((DecodeLine(1, 1e-3, 1e-6),), ((32, 3e-3),), 1e-8)
MODEL = "sha256:1234"
PROFILE = replace(model(layers=1), seconds={("cpu", "nf4"): DeviceSeconds(UNIT, (UNIT,) * 3)})
OTHERS = replace(PROFILE, seconds={("cpu", "fp16"): PROFILE.seconds["cpu", "nf4"]})


def test_ratios_multiply_and_are_kept(tmp_path: Path) -> None:
    kept = Cache(tmp_path)
    assert factor(kept, MODEL, CPU, "nf4") == Factor(1.0, 1.0)
    fold(kept, MODEL, [(CPU, "nf4")], Factor(1.2, 0.5))
    fold(kept, MODEL, [(CPU, "nf4")], Factor(1.5, 2.0))
    again = factor(Cache(tmp_path), MODEL, CPU, "nf4")
    assert (again.decode, again.prefill) == (pytest.approx(1.8), pytest.approx(1.0))
    assert factor(kept, "sha256:another model", CPU, "nf4") == Factor()
    assert factor(kept, MODEL, replace(CPU, kv_dtype="int8"), "nf4") == Factor()
    assert fold(kept, MODEL, [(CPU, "nf4")], Factor(1e9, 1.0))[0].decode == MOST


def test_a_format_without_a_run_is_off_as_the_others_are(tmp_path: Path) -> None:
    """Or a plan that was calibrated would lose to one that nobody ran."""
    kept = Cache(tmp_path)
    fold(kept, MODEL, [(CPU, "nf4")], Factor(2.0, 1.0))
    fold(kept, MODEL, [(CPU, "bf16")], Factor(0.25, 1.0))  # beyond nf4's 2.0, which it was foretold with
    borrowed = factor(kept, MODEL, CPU, "int8")
    assert (borrowed.decode, borrowed.borrowed) == (pytest.approx(1.0), True)
    assert factor(kept, MODEL, CPU, "bf16") == Factor(0.5, 1.0)
    fold(kept, MODEL, [(CPU, "int8")], Factor(1.5, 1.0))
    assert factor(kept, MODEL, CPU, "int8").decode == pytest.approx(1.5)
    estimate = solve(calibrated(OTHERS, CLUSTER, kept), CLUSTER, Workload(context=256), "fp16").estimate
    assert estimate is not None
    assert any(
        note.startswith("calibrated by a run of other formats: fp16 on cpu takes 1.14") for note in estimate.notes
    )


def test_the_formats_of_one_run_learn_once_each(tmp_path: Path) -> None:
    """None of them from another that the same run told of."""
    kept = Cache(tmp_path)
    found = fold(kept, MODEL, [(CPU, "bf16"), (CPU, "int8"), (replace(CPU, name="cpu:1"), "int8")], Factor(2.0, 0.5))
    assert found == [Factor(2.0, 0.5)] * 3
    assert factor(kept, MODEL, CPU, "int8") == Factor(2.0, 0.5)


def test_what_is_forgotten_borrows_again(tmp_path: Path) -> None:
    kept = Cache(tmp_path)
    fold(kept, MODEL, [(CPU, "nf4")], Factor(4.0, 1.0))
    forget(kept, MODEL, [CPU], ["nf4"])
    fold(kept, MODEL, [(CPU, "bf16")], Factor(2.0, 1.0))
    assert [factor(kept, MODEL, CPU, name).decode for name in ("nf4", "int8")] == pytest.approx([2.0, 2.0])


def test_seconds_are_multiplied_and_the_plan_says_so(tmp_path: Path) -> None:
    kept = Cache(tmp_path)
    assert calibrated(PROFILE, CLUSTER, kept) == PROFILE
    fold(kept, MODEL, [(CPU, "nf4")], Factor(2.0, 3.0))
    unit = calibrated(PROFILE, CLUSTER, kept).seconds["cpu", "nf4"].units[1]
    assert unit.decode_s(1, 1000) == pytest.approx(4e-3)
    assert unit.prefill_s(32) == pytest.approx(9e-3)
    facts = Facts(calibrated(PROFILE, CLUSTER, kept), CLUSTER)
    write_facts(facts, tmp_path / "facts.json")
    assert read_facts(tmp_path / "facts.json") == facts
    told = "nf4 on cpu takes 2.00 times its units' seconds decoding, 3.00 times for prompts"
    for profile, expected in ((PROFILE, 0), (read_facts(tmp_path / "facts.json").profile, 1)):
        estimate = solve(profile, CLUSTER, Workload(context=256), "nf4").estimate
        assert estimate is not None
        assert sum(told in note for note in estimate.notes) == expected


def test_measuring_again_forgets(tmp_path: Path) -> None:
    fold(Cache(tmp_path), MODEL, [(CPU, "nf4")], Factor(2.0, 3.0))
    anew = Cache(tmp_path, refresh=True)
    assert factor(anew, MODEL, CPU, "nf4") == Factor()
    forget(anew, MODEL, [CPU], ["nf4", "int8"])
    assert factor(Cache(tmp_path), MODEL, CPU, "nf4") == Factor()


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    kept = Cache(tmp_path)
    kept.put("a", {"x": 1.0})
    assert kept.get("a") == {"x": 1.0}
    assert not list(tmp_path.iterdir())


def test_what_a_run_told_is_in_the_next_plan_of_the_same_process() -> None:
    assert this_machine(False).cache is this_machine().cache is this_machine(refresh=False).cache


def test_an_older_view_does_not_undo_what_was_kept_since(tmp_path: Path) -> None:
    Cache(tmp_path).put("figure", {"value": 1.0})
    older = Cache(tmp_path)
    Cache(tmp_path).put("figure", {"value": 2.0})
    older.put("another", {"value": 3.0})
    assert older.get("figure") == Cache(tmp_path).get("figure") == {"value": 2.0}


def test_processes_do_not_lose_each_others_figures(tmp_path: Path) -> None:
    one, other = Cache(tmp_path), Cache(tmp_path)
    one.put("a", {"x": 1.0})
    other.put("b", {"x": 2.0})
    assert Cache(tmp_path).get("a") == {"x": 1.0}
    assert Cache(tmp_path).get("b") == {"x": 2.0}
