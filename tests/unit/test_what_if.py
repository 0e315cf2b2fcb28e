"""Hardware that is not here: data sheets, changes to a cluster, facts files, and what each refuses."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planner_models import GIB, MIB, device, model, random_seconds

from splitrun.errors import InvalidPlacement, SplitrunError
from splitrun.planner.datasheet import CARD_PROCESS_BYTES, SPREAD, device_names, find_device, find_link
from splitrun.planner.facts import Cluster, Link, Workload
from splitrun.planner.facts_file import Facts, read_facts, write_facts
from splitrun.planner.memory import placement_memory
from splitrun.planner.peaks import RowsPeak, UnitPeak
from splitrun.planner.picture import draw, save_picture
from splitrun.planner.placement import StageSpec
from splitrun.planner.profile_table import distinct, profile_lines
from splitrun.planner.solve import solve
from splitrun.planner.what_if import Changes, changed, machine_of, with_budgets
from splitrun.what_if import Question, answer

HERE = Cluster((device(), device("cuda:0", budget=4 * GIB), device("cuda:1", budget=4 * GIB)), {})


@pytest.mark.parametrize("name", device_names())
def test_every_sheet_makes_a_device(name: str) -> None:
    sheet = find_device(name, "--add")
    made = sheet.device("cpu" if sheet.kind == "cpu" else f"{sheet.kind}:0", "host")
    assert 0 < made.budget_bytes < made.total_bytes
    assert (made.source, made.spread) == ("datasheet", SPREAD)
    assert made.bandwidth_bytes_per_s < 2e12
    find_link(sheet.link)


@pytest.mark.parametrize(
    "text", ["GTX 1060 3GB", "gtx1060 3gb", "NVIDIA GeForce GTX 1060 3GiB", "geforce gtx 1060 3GB"]
)
def test_names_are_found_however_they_are_written(text: str) -> None:
    assert find_device(text, "--add").name == "GTX 1060 3GB"


def test_a_card_joins_its_machine_and_a_node_the_network() -> None:
    cluster, notes = changed(HERE, Changes(("GTX 1060 3GB", "UHD 630"), ("RTX 2060 6GB",), ("cuda:1",), "2.5GbE"))
    assert [each.name for each in cluster.devices] == ["cpu", "cuda:0", "cuda:1", "xpu:0", "node1/cuda:0"]
    assert cluster.device("cuda:1").description == "GTX 1060 3GB (datasheet)"
    assert cluster.link("cpu", "cuda:1") == find_link("PCIe 3.0 x16")
    assert cluster.link("cuda:0", "node1/cuda:0") == find_link("2.5gbe")
    assert cluster.device("xpu:0").memory_pool == "host"
    assert notes[1:] == ["xpu:0: torch does not compute on it: the plan shows the split, it cannot be run"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (Changes(add=("GTX 1066 3GB",)), r"--add 'GTX 1066 3GB' is not known; did you mean GTX 1060"),
        (Changes(add=("qqqq",)), "--add 'qqqq' is not known; known: GTX 1050 Ti 4GB, "),
        (Changes(add=("desktop DDR4 CPU",)), "is a processor: name it with --machine or --add-node"),
        (Changes(drop=("cuda:2",)), "--drop: there is no 'cuda:2': did you mean cuda:"),
        (Changes(drop=("cpu", "cuda:0", "cuda:1")), "no device is left"),
        (Changes(add=("cuda:0",), drop=("cuda:0",)), "is both added and dropped"),
        (Changes(link="1GbF"), r"--link '1GbF' is not known; did you mean 1GbE"),
    ],
)
def test_changes_refused(changes: Changes, why: str) -> None:
    with pytest.raises(InvalidPlacement, match=why):
        changed(HERE, changes)


def test_a_card_from_a_sheet_is_paid_for_in_main_memory() -> None:
    """With what was measured here, where a card was used here; else with the figure that the sheets come with."""
    laptop, card = machine_of("laptop DDR4 CPU"), Changes(add=("RTX 3050 4GB", "GTX 1060 3GB"))
    cluster, notes = changed(laptop, card)
    assert cluster.card_process_bytes == CARD_PROCESS_BYTES
    assert notes == ["cuda:0: a card in use takes main memory too; its 500 MiB were measured beside another card"]
    plan = solve(model(values=100 * MIB), cluster, Workload(context=512), "bf16", stream=True)
    stages = (StageSpec("cpu", True, (0, 0), False), StageSpec("cuda:0", False, (0, 8), True))
    bills = placement_memory(model(), cluster, replace(plan, stages=stages))
    assert [bill.context_bytes - cluster.device(bill.device).context_bytes for bill in bills] == [CARD_PROCESS_BYTES, 0]
    known, notes = changed(replace(HERE, card_process_bytes=GIB), card)
    assert (known.card_process_bytes, notes) == (GIB, [])
    node, notes = changed(laptop, Changes(add_node=("RTX 3050 4GB",)))
    assert (node.card_process_bytes, notes) == (0, [])


def test_a_machine_is_a_processor() -> None:
    assert [each.name for each in machine_of("i7 ddr4 cpu").devices] == ["cpu"]
    with pytest.raises(InvalidPlacement, match="is no processor"):
        machine_of("RTX 3060 12GB")


@pytest.mark.parametrize(
    ("memory", "why"),
    [
        ({"cuda:7": "1GiB"}, "facts.json has no 'cuda:7'"),
        ({"cpu": "0"}, "a budget of 0 for cpu"),
        ({"cpu": "900GiB"}, "cpu has 16.0 GiB of memory, not 900GiB"),
        ({"cpu": "much"}, "budget of cpu: "),
    ],
)
def test_budgets_refused(memory: dict[str, str | int], why: str) -> None:
    with pytest.raises(InvalidPlacement, match=why):
        with_budgets(HERE, memory, "facts.json")


def test_budgets_choose_the_devices() -> None:
    found = with_budgets(HERE, {"cuda:0": "1GiB", "cpu": "auto"}, "x")
    assert [(each.name, each.budget_bytes) for each in found.devices] == [("cuda:0", GIB), ("cpu", 8 * GIB)]


def some_facts() -> Facts:
    cluster = replace(HERE, links={("cpu", "cuda:0"): Link(1e-5, 1e10)}, step_s=1e-4)
    return Facts(random_seconds(random.Random(3), model(layers=2), cluster), cluster, "0.1")


def test_facts_survive_the_file(tmp_path: Path) -> None:
    peak = UnitPeak(7, ((32, 1.0),), ((0, 1.0), (8, 2.0)), (RowsPeak(1, 1.0, 0.5),))
    facts = some_facts()
    facts = replace(facts, profile=replace(facts.profile, peaks={("cpu", "bf16"): (peak,) * 4}))
    write_facts(facts, tmp_path / "facts.json")
    assert read_facts(tmp_path / "facts.json") == facts
    (tmp_path / "file").write_text("")
    with pytest.raises(SplitrunError, match="cannot be written"):
        write_facts(facts, tmp_path / "file" / "facts.json")


def broken(change: str) -> Any:
    content: Any = {"version": 2, **json.loads(json.dumps(_plain()))}
    unit = content["profile"]["units"][0]
    changes: dict[str, Any] = {
        "version": lambda: content.update(version=1),
        "no version": lambda: content.pop("version"),
        "unknown": lambda: content["cluster"].update(colour=1),
        "missing": lambda: unit.pop("weight_bytes"),
        "text": lambda: unit.update(name=5),
        "no devices": lambda: content["cluster"].update(devices=[]),
        "a device twice": lambda: content["cluster"].update(devices=content["cluster"]["devices"] * 2),
        "no speed": lambda: content["cluster"]["devices"][0].update(bandwidth_bytes_per_s=0),
        "no units": lambda: content["profile"].update(units=[]),
        "an unknown format": lambda: content["profile"].update(stored_format="q4"),
        "no bytes": lambda: unit.update(weight_bytes={}),
        "too few seconds": content["profile"]["seconds"][0][-1]["units"].pop,
        "no groups": lambda: content["profile"].update(groups=[]),
        "negative": lambda: unit["weight_bytes"].update(bf16=-1),
        "huge": lambda: content["cluster"]["devices"][0].update(budget_bytes=10**30),
        "endless": lambda: content["cluster"]["devices"][0].update(flops_per_s=10**400),
        "endless below 0": lambda: content["cluster"]["devices"][0].update(flops_per_s=-(10**400)),
        "kind": lambda: content["cluster"]["devices"][0].update(kind="tpu"),
        "short": lambda: content["profile"]["seconds"].append(["cpu"]),
        "list": lambda: content["profile"].update(units={}),
    }
    changes[change]()
    return content


def _plain() -> Any:
    from splitrun.planner.facts_file import plain

    return plain(some_facts())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("version", "version 1 is not this splitrun's version 2; make it again with: splitrun profile MODEL --facts"),
        ("no version", "not a facts file: it has no version"),
        ("unknown", "cluster.colour is unknown"),
        ("missing", r"profile.units\[0\].weight_bytes is missing"),
        ("text", r"profile.units\[0\].name must be text"),
        ("negative", r"weight_bytes.bf16 must be finite and not negative"),
        ("huge", r"cluster.devices\[0\].budget_bytes is larger than any size or count"),
        ("endless", r"cluster.devices\[0\].flops_per_s is larger than any"),
        ("endless below 0", r"cluster.devices\[0\].flops_per_s is larger than any"),
        ("kind", r"cluster.devices\[0\].kind must be one of cpu, cuda"),
        ("short", "profile.seconds must be a mapping"),
        ("list", "profile.units must be a list"),
        ("no devices", "cluster.devices must name at least one device"),
        ("a device twice", "cluster.devices names a device twice"),
        ("no speed", "cluster.devices: speeds must be more than 0"),
        ("no units", "profile.units must be embed, layers and head"),
        ("an unknown format", "profile.stored_format must be one of fp32, bf16"),
        ("no bytes", "profile.units must have bytes in a format that is known"),
        ("too few seconds", "profile.seconds and profile.peaks must have an entry for every unit"),
        ("no groups", "profile.units keep KV in a group that profile.groups lacks"),
    ],
)
def test_facts_files_refused(tmp_path: Path, change: str, why: str) -> None:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(broken(change)))
    with pytest.raises(InvalidPlacement, match=why) as refusal:
        read_facts(file)
    assert str(refusal.value).startswith(f"{file}: ")


@pytest.mark.parametrize(("text", "why"), [("{", "not JSON"), ("[]", "no version"), (None, "no such file")])
def test_what_is_no_facts_file(tmp_path: Path, text: str | None, why: str) -> None:
    file = tmp_path / "facts.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InvalidPlacement, match=why):
        read_facts(file)


@pytest.mark.parametrize("drop", [("cuda:0", "cuda:1"), ("cuda:0", "cuda:1", "cpu")])
def test_a_card_that_takes_another_one_s_name_is_as_its_sheet_says(drop: tuple[str, ...], tmp_path: Path) -> None:
    """And not as the other one was timed."""
    facts, file = some_facts(), tmp_path / "facts.json"
    write_facts(facts, file)
    asked = Question("some/model", Changes(("RTX 4090 24GB",), drop=drop), facts=str(file), weights="bf16", context=256)
    plan = answer(asked)
    bare = Facts(facts.profile.of_devices(() if "cpu" in drop else ("cpu",)), facts.cluster.without(drop))
    new = solve(bare.profile, changed(bare.cluster, Changes(asked.changes.add))[0], Workload(context=256), "bf16",
                stream=True)  # fmt: skip
    assert plan.estimate is not None
    assert new.estimate is not None
    assert plan.stages == new.stages
    assert plan.estimate.step_s == new.estimate.step_s


def test_a_budget_under_a_dropped_name_is_the_added_card_s(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    write_facts(some_facts(), file)
    changes = Changes(("RTX 4090 24GB",), drop=("cuda:0", "cuda:1", "cpu"))
    asked = Question("some/model", changes, facts=str(file), memory={"cuda:0": "3GiB"}, context=256)
    assert answer(asked).devices == {"cuda:0": 3 * GIB}


def test_the_profile_names_each_shape_once() -> None:
    facts = some_facts()
    assert [name for name, _ in distinct(facts.profile)] == ["embed", "layers 0–1", "head"]
    text = "\n".join(profile_lines(facts.profile, facts.cluster))
    assert "every stage" in text
    assert "some/model · qwen3 · 2 layers" in text


def test_the_picture_shows_every_device(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    plan = solve(model(layers=8, values=400 << 20), HERE, Workload(), "bf16")
    root = ElementTree.fromstring(draw(plan))
    words = " ".join(node.text or "" for node in root.iter() if node.tag.endswith("text"))
    assert all(name in words for name in plan.device_names)
    assert len(plan.device_names) > 1
    save_picture(plan, tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_text("utf-8") == draw(plan)
    with pytest.raises(InvalidPlacement, match="has no estimate to draw"):
        draw(replace(plan, estimate=None))
    (tmp_path / "file").write_text("")
    with pytest.raises(SplitrunError, match="cannot be written"):
        save_picture(plan, tmp_path / "file" / "plan.svg")
