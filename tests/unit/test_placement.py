"""The placement object: tiling proved, values checked, saved whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from planner_models import GIB, device, model

from splitrun.errors import InvalidPlacement, SplitrunError
from splitrun.planner.facts import Cluster, Workload
from splitrun.planner.placement import KVSpec, ModelRef, Placement, StageSpec, device_fault
from splitrun.planner.solve import solve


def placement(*stages: StageSpec, layers: int | None = 4, **more: Any) -> Placement:
    facts: dict[str, Any] = {"version": 1, "model": ModelRef("demo", layers=layers), "workload": Workload()}
    return Placement(**(facts | more), stages=stages)


WHOLE = StageSpec("cpu", True, (0, 4), True)


def test_the_design_example_tiles() -> None:
    stages = (
        StageSpec("cpu", True, (0, 0), False),
        StageSpec("cuda:0", False, (0, 6), False, "nf4", KVSpec("bf16", 64)),
        StageSpec("cpu", False, (6, 8), False, "int8"),
        StageSpec("cuda:0", False, (8, 8), True),
    )
    plan = placement(*stages, layers=None)
    assert plan.layers == 8
    assert plan.device_names == ("cpu", "cuda:0")
    assert plan.has_device("cuda:0")
    assert not plan.has_device("cuda:1")
    assert [list(stage.units) for stage in stages] == [[0], [1, 2, 3, 4, 5, 6], [7, 8], [9]]
    assert [stage.units_text for stage in stages] == ["embed", "layers 0–5", "layers 6–7", "head"]


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        ([], "stages.0.: embed is missing"),
        ([(False, (0, 4), True)], "embed is missing"),
        ([(True, (0, 4), False)], "head is missing after the last stage"),
        ([(True, (0, 3), False), (False, (4, 4), True)], "stages.1.: layer 3 is missing"),
        ([(True, (0, 2), False), (False, (1, 4), True)], "stages.1.: layer 1 is computed twice"),
        ([(False, (0, 4), True), (True, (0, 0), False)], "embed is missing"),
        ([(True, (0, 4), True), (False, (4, 4), True)], "stages.1.: head is computed twice"),
        ([(True, (0, 4), True), (True, (0, 0), False)], "stages.1.: embed is computed twice"),
        ([(True, (1, 4), True)], "embed comes before layer 0"),
        ([(True, (0, 3), True)], "head comes after layer 3"),
        ([(True, (0, 5), True)], "beyond the model's 4 layers"),
        (
            [(True, (0, 2), False), (False, (2, 2), False), (False, (2, 4), True)],
            "stages.1.: the stage computes nothing",
        ),
    ],
)
def test_broken_tilings(stages: list[tuple[bool, tuple[int, int], bool]], why: str) -> None:
    with pytest.raises(InvalidPlacement, match=why):
        placement(*(StageSpec("cpu", *stage) for stage in stages))


@pytest.mark.parametrize(
    "name", ["cpu", "cpu:1", "cpu:12", "cuda:0", "cuda:10", "xpu:3", "mps", "node-1/cpu", "a.b/cuda:0", "gpu_box/mps"]
)
def test_device_names(name: str) -> None:
    assert device_fault(name) is None


@pytest.mark.parametrize(
    "name",
    ["", "cpu:0", "cpu:01", "cuda", "cuda:", "cuda:-1", "cuda:01", "cuda:99999", "CPU", "gpu:0", "mps:0", "a/b/cpu",
     "/cpu", "-a/cpu", "cpu\n", " cpu", "cpu ", "cuda:0:1", "cuda:٣", "x" * 64 + "/cpu", "disk", "meta", "rocm:0"],
)  # fmt: skip
def test_what_is_no_device(name: str) -> None:
    with pytest.raises(InvalidPlacement, match="is not a device"):
        StageSpec(name, True, (0, 1), True)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "fp8"},
        {"layers": (2, 1)},
        {"layers": (-1, 4)},
        {"threads": 0},
        {"threads": 5000},
        {"stream_buffer_bytes": -1},
        {"stream_buffer_bytes": 1 << 60},
        {"stream_from_tokens": 16},
        {"device": "cuda:0", "kv": KVSpec("int8")},
        {"device": "node/cuda:0", "kv": KVSpec("int8")},
    ],
)
def test_impossible_stages(change: dict[str, Any]) -> None:
    facts: dict[str, Any] = {"device": "cpu", "embed": True, "layers": (0, 4), "head": True}
    with pytest.raises(InvalidPlacement, match="is not allowed"):
        StageSpec(**(facts | change))


@pytest.mark.parametrize(
    "change", [{"dtype": "int4"}, {"device_blocks": 0}, {"host_blocks": -1}, {"disk_blocks": 1 << 30}]
)
def test_impossible_kv(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlacement, match="is not allowed"):
        KVSpec(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"model": ModelRef("")},
        {"model": ModelRef("demo", layers=0)},
        {"workload": Workload(context=0)},
        {"workload": Workload(sessions=-1)},
        {"workload": Workload(chunk_tokens=0)},
        {"workload": Workload(block_tokens=1 << 20)},
        {"devices": {"cpu": 0}},
        {"devices": {"cpu": 1 << 60}},
        {"devices": {"gpu": 5}},
    ],
)
def test_impossible_placements(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlacement):
        placement(WHOLE, **change)


def test_saving_and_loading_gives_the_same(tmp_path: Path) -> None:
    stages = (
        StageSpec("node/cpu", True, (0, 1), False, "fp32", KVSpec("fp32", 7, 8, 9), 3, 12345),
        StageSpec("cuda:0", False, (1, 4), False, "nf4", KVSpec(None, 5)),
        StageSpec("mps", False, (4, 4), True, "int8"),
    )
    workload = Workload(1234, 5, "throughput", 77, 16)
    budgets = {"node/cpu": 3 * GIB, "cuda:0": 1000001, "mps": 5 << 20}
    plan = Placement(1, ModelRef("a: 'b' #c", "null", 4, "sha256:9"), workload, stages, budgets, streams=2)
    plan.save(tmp_path / "plan.yaml")
    assert Placement.load(tmp_path / "plan.yaml") == plan


def test_a_solved_placement_keeps_its_estimate(tmp_path: Path) -> None:
    plan = solve(model(), Cluster((device(), device("cuda:0", budget=GIB))), Workload(sessions=3))
    plan.save(tmp_path / "plan.yaml")
    loaded = Placement.load(tmp_path / "plan.yaml")
    assert loaded.estimate is not None
    assert loaded.explain() == plan.explain()


def test_json_holds_what_the_file_holds(tmp_path: Path) -> None:
    plan = solve(model(), Cluster((device(),)), Workload())
    plan.save(tmp_path / "plan.yaml")
    assert json.loads(plan.to_json()) == yaml.safe_load((tmp_path / "plan.yaml").read_text("utf-8"))
    assert "\n" not in plan.to_json()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers: [0, 8]", "layers: [0, 7]}\n  - {device: cpu, units: [head], layers: [7, 8]"),  # other stages
        ("context: 4096, sessions", "context: 2048, sessions"),  # another workload
        ("kv: {dtype: bf16}", "kv: {dtype: fp32}"),
        ("weights: bf16,", "weights: bf16, threads: 1,"),
        ("chunk_tokens: 512", "chunk_tokens: 8192"),
        ("block_tokens: 64", "block_tokens: 7"),
        ("  of: sha256:", "  from: sha256:"),  # of an earlier build
        ("  step_s: ", "  step_s: -"),
        ("  step_s: ", "  step_s: .nan #"),
        ("  step_s: ", "  step_s: 1e999 #"),
        ("  step_s: ", "  speed: "),
        ("  notes:\n  - ", "  notes:\n  - 1\n  - "),
        ("  notes:\n  - ", "  notes:\n    one: "),
        ("estimate:\n", "estimate: 5\nmodel:\n"),
    ],
)
def test_an_estimate_that_no_longer_describes_the_plan_is_dropped(tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / "plan.yaml"
    solve(model(), Cluster((device(),)), Workload(), "bf16").save(file)
    text = file.read_text("utf-8")
    assert old in text
    if old == "estimate:\n":
        text = text[: text.index(old)] + "estimate: 5\n"
    elif "units: [head]" in new:
        text = text.replace("units: [embed, head], ", "units: [embed], ").replace(old, new)
    else:
        text = text.replace(old, new)
    file.write_text(text, "utf-8")
    assert Placement.load(file).estimate is None


def test_an_edited_budget_is_the_one_that_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    solve(model(), Cluster((device(),)), Workload(), "bf16").save(file)
    file.write_text(file.read_text("utf-8").replace("memory: 8GiB", "memory: 3GiB"), "utf-8")
    estimate = Placement.load(file).estimate
    assert estimate is not None
    assert [bill.budget_bytes for bill in estimate.devices] == [3 * GIB]


def test_saving_keeps_the_old_file_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SplitrunError, match=r"plan\.yaml: cannot be written: No space left on device; name another"):
        placement(WHOLE).save(file)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_saving_where_a_folder_or_a_file_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    for target in (tmp_path / "folder", tmp_path / "file" / "plan.yaml"):
        with pytest.raises(SplitrunError, match="cannot be written: "):
            placement(WHOLE).save(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_saving_makes_no_folder_and_follows_links(tmp_path: Path) -> None:
    plan = placement(WHOLE)
    with pytest.raises(SplitrunError, match=r"there is no folder .*new"):
        plan.save(tmp_path / "new" / "plan.yaml")
    (tmp_path / "new").mkdir()
    plan.save(tmp_path / "new" / "plan.yaml")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "new" / "plan.yaml")
    placement(StageSpec("mps", True, (0, 4), True)).save(str(tmp_path / "link.yaml"))
    assert (tmp_path / "link.yaml").is_symlink()
    assert Placement.load(tmp_path / "new" / "plan.yaml").device_names == ("mps",)
