"""What nodes keep, compare and name: without Ray, which is started in the integration tests alone."""

from __future__ import annotations

import base64
import json
import os
import queue
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny_models import make_model

from splitrun.cluster import model_there, runtime
from splitrun.cluster.facts import joined
from splitrun.cluster.home import Home, NodeRecord
from splitrun.cluster.lines import Parent
from splitrun.cluster.members import members
from splitrun.cluster.model_there import ReceivedSource, describe_model, locate, write_description
from splitrun.cluster.node import join, running, start_head, stop
from splitrun.cluster.ports import (
    address_towards,
    own_address,
    require_free,
    require_reachable,
    split_address,
)
from splitrun.cluster.process import local_device, machine_of
from splitrun.cluster.runtime import Registry
from splitrun.cluster.survey import split_memory
from splitrun.cluster.versions import differences, own_versions
from splitrun.engine.record import Record, Span, perfetto
from splitrun.errors import ClusterError, InvalidPlacement
from splitrun.model.files import resolve
from splitrun.planner.datasheet import CARD_PROCESS_BYTES
from splitrun.planner.facts import Cluster, Device, Link, ModelProfile
from splitrun.planner.facts_file import Facts
from splitrun.planner.peaks import UnitPeak


def test_a_token_is_made_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    home = Home(tmp_path / "state" / "splitrun")
    token = home.token()
    assert home.token() == token
    assert len(token) == 48
    assert home.token_file.stat().st_mode & 0o777 == 0o600
    assert home.folder.stat().st_mode & 0o777 == 0o700
    home.token_file.write_text("short")
    with pytest.raises(ClusterError, match="holds no token; remove it"):
        home.token()
    with pytest.raises(ClusterError, match="that is no token"):
        home.keep_token("no; token")


def test_a_record_of_a_process_that_has_ended_counts_for_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert running(home) is None
    home.keep_record(NodeRecord("one", "127.0.0.1", 7400, "127.0.0.1:7400", 2**22 - 1))
    assert home.record() is not None
    assert running(home) is None
    with pytest.raises(ClusterError, match="no node runs on this machine"):
        stop(home)
    (tmp_path / "node.json").write_text("{")
    with pytest.raises(ClusterError, match=r"node\.json cannot be read"):
        home.record()


def test_the_home_is_where_the_environment_says() -> None:
    assert Home.default({"SPLITRUN_HOME": "/a", "XDG_STATE_HOME": "/b"}).folder == Path("/a")
    assert Home.default({"XDG_STATE_HOME": "/b"}).folder == Path("/b/splitrun")
    assert Home.default({}).folder == Path.home() / ".local" / "state" / "splitrun"


def test_a_home_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ClusterError, match="cannot be written: Not a directory; set SPLITRUN_HOME"):
        Home(tmp_path / "file" / "home").keep_token("0" * 48)


def test_differences_name_both_sides() -> None:
    here = own_versions()
    assert differences(here, here) == []
    assert differences({"Python": "3.11", "Ray": "2"}, {"Python": "3.12"}) == [
        "Python 3.11 here, 3.12 there", "Ray 2 here, missing there",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["host", ":7400", "host:", "host:0", "host:70000", "host:x"])
def test_an_address_must_be_one(text: str) -> None:
    with pytest.raises(ClusterError, match="is not HOST:PORT"):
        split_address(text)


def test_addresses() -> None:
    assert split_address("127.0.0.1:7400") == ("127.0.0.1", 7400)
    assert address_towards("127.0.0.1", 7400) == "127.0.0.1"
    assert own_address("localhost") == "127.0.0.1"
    with pytest.raises(ClusterError, match=r"--host 203\.0\.113\.7 is no address of this machine: it has "):
        own_address("203.0.113.7")
    with pytest.raises(ClusterError, match="cannot be found"):
        own_address("no-such-host.invalid")


def test_taken_ports_and_absent_heads_are_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        require_reachable("127.0.0.1", port)
        with pytest.raises(ClusterError, match=f"port {port} on 127.0.0.1 is taken .* choose another --port"):
            require_free("127.0.0.1", port)
    with pytest.raises(ClusterError, match=r"nobody listens on .*: start the first machine"):
        join(Home(tmp_path), f"127.0.0.1:{min(port, 60000)}", "0" * 48)


@pytest.mark.parametrize("name", ["process", "process-2", "a/b", "-a", "ä"])
def test_names_that_plans_could_not_use_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="cannot be a node's name"):
        start_head(Home(tmp_path), name=name)


def test_machines_of_devices() -> None:
    assert [machine_of(name) for name in ("cpu", "process/cpu", "process-2/cuda:0", "desk/cpu")] == ["", "", "", "desk"]
    assert local_device("desk/cpu") == "desk/cpu"


def test_budgets_are_split_by_machine() -> None:
    assert split_memory(None) == (None, {})
    assert split_memory({"cpu": "1GiB", "desk/cpu": "auto", "desk/cuda:0": 5}) == (
        {"cpu": "1GiB"}, {"desk": {"cpu": "auto", "cuda:0": 5}},
    )  # fmt: skip
    with pytest.raises(InvalidPlacement, match="names no device of this machine"):
        split_memory({"desk/cpu": "auto"})


def facts(*devices: str) -> Facts:
    kinds: list[Literal["cpu", "cuda"]] = ["cuda" if name.startswith("cuda") else "cpu" for name in devices]
    made = [
        Device(name, kind, "", 1, 1, 1, "host", 0, 1.0, 1.0, 0.0, "bf16")
        for name, kind in zip(devices, kinds, strict=True)
    ]
    profile = ModelProfile("m", None, "f", "llama", (), (), 1, 1, 1, "bf16")
    return Facts(profile, Cluster(tuple(made)))


class Notes(Registry):
    """A head that counts in two of three nodes."""

    def __init__(self, ports: dict[str, int]) -> None:
        self._ports = ports

    def notes(self, prefix: str) -> dict[str, str]:
        return {
            name: json.dumps({"host": "127.0.0.1", "port": port, "resource": f"{prefix}{name}"})
            for name, port in self._ports.items()
        }

    def resources(self) -> set[str]:
        return {"node up", "node walled"}


def test_a_node_behind_a_firewall_is_told_from_one_that_has_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        ports = {"up": listener.getsockname()[1] - 1, "walled": closed.getsockname()[1] - 1, "left": 7400}
        found = {node.name: node for node in members(Notes(ports))}
    assert {name: (node.alive, node.silent) for name, node in found.items()} == {
        "up": (True, False), "walled": (False, True), "left": (False, False)
    }  # fmt: skip
    assert found["up"].trouble == ""
    assert f"does its firewall not let TCP ports {ports['walled']}-{ports['walled'] + 99} in" in found["walled"].trouble
    assert "'splitrun node join' on it brings it back" in found["left"].trouble


def test_clusters_are_joined_by_measured_links() -> None:
    near, far = Link(1e-3, 1e8), Link(5e-3, 1e6)
    found = joined(facts("cpu"), {"a": facts("cpu"), "b": facts("cpu")}, {("", "a"): near, ("", "b"): far}).cluster
    assert [device.name for device in found.devices] == ["cpu", "a/cpu", "b/cpu"]
    assert [device.memory_pool for device in found.devices] == ["host", "a/host", "b/host"]
    assert found.link("cpu", "a/cpu") == found.link("a/cpu", "cpu") == near
    assert found.link("cpu", "b/cpu") == far
    assert found.link("a/cpu", "b/cpu") == far  # not measured: as far as the farthest


def test_a_process_on_a_node_takes_what_one_takes_here() -> None:
    here, there = facts("cpu"), facts("cpu")
    (cpu,) = here.cluster.devices
    here = replace(here, cluster=replace(here.cluster, devices=(replace(cpu, context_bytes=400 << 20),)))
    found = joined(here, {"a": there}, {}).cluster
    assert [device.context_bytes for device in found.devices] == [400 << 20, 400 << 20]


def test_a_nodes_processor_pays_for_the_processes_of_its_cards() -> None:
    here, there = facts("cpu"), facts("cpu", "cpu:1", "cuda:0", "cuda:1")
    here = replace(here, cluster=replace(here.cluster, devices=(replace(here.cluster.devices[0], context_bytes=400),)))
    known = replace(here, cluster=replace(here.cluster, card_process_bytes=300, card_layers_bytes=50))
    for one, driver in ((here, CARD_PROCESS_BYTES), (known, 350)):
        found = {device.name: device.context_bytes for device in joined(one, {"a": there}, {}).cluster.devices}
        assert found["a/cpu"] == 400 + 2 * (400 + driver)
        assert found["a/cpu:1"] == found["cpu"] == 400
        assert found["a/cuda:0"] == there.cluster.device("cuda:0").context_bytes


class Sender:
    """The coordinator's side of a received model: sends pieces, until the line is cut."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.sent: list[tuple[str, int, int]] = []
        self.cut_after = sys.maxsize
        self._source = source
        self._folder = folder

    def __call__(self, name: str, start: int, stop: int) -> None:
        if len(self.sent) == self.cut_after:
            raise ClusterError("the line is cut")
        self.sent.append((name, start, stop))
        with (self._folder / name).open("r+b") as target:
            target.seek(start)
            target.write((self._source / name).read_bytes()[start:stop])


def test_a_received_model_is_fetched_tensor_by_tensor_and_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_model("llama").save_pretrained(source)
    files, folder = resolve(str(source)), tmp_path / "received"
    write_description(folder, describe_model(files))
    assert resolve(str(folder)).fingerprint == files.fingerprint
    fetch = Sender(source, folder)
    there = ReceivedSource(folder, fetch)
    first, second, *_ = there.names()
    assert torch.equal(there.read(first), files.source.read(first))
    there.read(first)
    assert len(fetch.sent) == 1
    assert torch.equal(ReceivedSource(folder, fetch).read(first), files.source.read(first))
    assert len(fetch.sent) == 1
    there.read(second)
    assert len(fetch.sent) == 2


def test_a_tensor_that_was_cut_in_the_middle_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    make_model("llama").save_pretrained(source)
    files, folder = resolve(str(source)), tmp_path / "received"
    write_description(folder, describe_model(files))
    name = max(files.source.names(), key=files.source.nbytes)
    monkeypatch.setattr(model_there, "PIECE_BYTES", files.source.nbytes(name) // 4 + 1)
    fetch = Sender(source, folder)
    fetch.cut_after = 2
    with pytest.raises(ClusterError, match="cut"):
        ReceivedSource(folder, fetch).read(name)
    fetch.cut_after = sys.maxsize
    assert torch.equal(ReceivedSource(folder, fetch).read(name), files.source.read(name))
    assert len(fetch.sent) == len(set(fetch.sent)) == 4
    assert sum(stop - start for _, start, stop in fetch.sent) == files.source.nbytes(name)


def test_a_description_that_comes_twice_takes_nothing_away(tmp_path: Path) -> None:
    """Stages of two devices of a node start at once."""
    source = tmp_path / "source"
    make_model("llama").save_pretrained(source)
    files, folder = resolve(str(source)), tmp_path / "received"
    write_description(folder, describe_model(files))
    fetch = Sender(source, folder)
    there = ReceivedSource(folder, fetch)
    first = next(iter(there.names()))
    there.read(first)
    write_description(folder, describe_model(files))
    assert torch.equal(ReceivedSource(folder, fetch).read(first), files.source.read(first))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("received")] == ["received"]


def test_another_model_under_the_same_path_is_named_on_both_sides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model("llama").save_pretrained(tmp_path)
    job = {"source": str(tmp_path), "revision": None, "fingerprint": "sha256:other", "weights": True}
    with pytest.raises(ClusterError, match=r"is another model for desk/cpu .* than on the coordinator") as caught:
        locate(job, FakeParent(), "desk/cpu")
    assert caplog.messages == [str(caught.value)]


class FakeParent(Parent):
    """A parent that says nothing."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()


def test_an_answer_is_found_among_other_words() -> None:
    parent = FakeParent()
    for message in ({"peers": 1}, {"stored": 2}):
        parent.told.put(message)
    assert parent.answer("stored") == 2
    assert parent.told.get() == {"peers": 1}


def test_a_description_stays_inside_its_folder(tmp_path: Path) -> None:
    text = base64.b64encode(b"x").decode()
    write_description(tmp_path / "in", {"whole": {"../out.json": text}, "shards": {"../../out.safetensors": [9, text]}})
    assert sorted(file.name for file in (tmp_path / "in").iterdir()) == ["out.json", "out.safetensors", "received.txt"]
    assert not (tmp_path / "out.json").exists()


def test_a_trace_has_a_process_per_machine_and_an_arrow_per_hop() -> None:
    record = Record()
    for stage in (0, 1):
        record.add(Span(stage, 7, 0, 3, (1, 2), 10.0 + stage, 0.5))
    events = perfetto(record.take(), [("here", "embed on cpu"), ("desk", "head on desk/cpu")])["traceEvents"]
    work = [event for event in events if event["ph"] == "X"]
    assert [(event["pid"], event["tid"], event["ts"], event["dur"]) for event in work] == [
        (0, 0, 0, 5e5),
        (1, 1, 1e6, 5e5),
    ]
    assert work[0]["args"]["requests"] == [1, 2]
    assert [event["ph"] for event in events if event.get("cat") == "hop"] == ["s", "f"]
    assert record.take() == []
    json.dumps(events)


def test_spans_of_others_are_set_to_this_clock() -> None:
    span = Span(1, 2, 3, 4, (5,), 6.0, 0.25)
    assert Span.from_list(span.to_list(), 100.0) == Span(1, 2, 3, 4, (5,), 106.0, 0.25)
    for broken in ([], [1, 2], ["a"] * 7):
        with pytest.raises((TypeError, ValueError)):
            Span.from_list(broken, 0.0)


def test_what_killed_nodes_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next start, and by a stop that finds no node; what belongs to a living process or is not ours stays."""
    monkeypatch.setattr(runtime, "_temporary", lambda: tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, used, other = (tmp_path / name for name in (f"splitrun-ray-{ended.pid}-x", f"splitrun-ray-{os.getpid()}-x",
                                                      "splitrun-ray-other-x"))  # fmt: skip
    for folder in (left, used, other):
        (folder / "session").mkdir(parents=True)
    with pytest.raises(ClusterError, match="no node runs on this machine"):
        stop(Home(tmp_path / "home"))
    assert [folder.exists() for folder in (left, used, other)] == [False, True, True]


ONE_MACHINE = """
import sys, splitrun
from splitrun import api
from splitrun.planner.facts import Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec
stages = (StageSpec("cpu", True, (0, 8), True, weights="fp32"),)
with splitrun.Engine(Placement(1, ModelRef("demo", layers=8), Workload(64), stages)) as engine:
    engine.generate(["Hello"], splitrun.SamplingParams(max_tokens=2))
print("ray" in sys.modules)
"""


def test_one_machine_never_imports_ray() -> None:
    outcome = subprocess.run([sys.executable, "-c", ONE_MACHINE], capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == "False"


JSON_LINES = """
from splitrun.engine.record import Record, Span, log_json
log_json("desk/cpu")
record = Record()
record.add(Span(1, 2, 0, 3, (4, 5), 6.0, 0.0071))
record.keep(Span(0, 2, 0, 3, (4, 5), 6.0, 0.0071))
"""


def test_a_step_is_one_json_line_with_its_requests() -> None:
    """Spans of other processes are written there, not here again."""
    outcome = subprocess.run([sys.executable, "-c", JSON_LINES], capture_output=True, text=True, check=True)
    (line,) = [json.loads(line) for line in outcome.stderr.splitlines()]
    del line["time"]
    assert line == {"level": "info", "where": "desk/cpu", "message": "step", "stage": 1, "step": 2, "epoch": 0,
                    "tokens": 3, "requests": [4, 5], "ms": 7.1}  # fmt: skip


def test_what_steps_take_on_a_node_is_known() -> None:
    here, there = facts("cpu"), facts("cpu")
    peaks = {("cpu", "nf4"): (UnitPeak(7, ((32, 8.0),), (), ()),) * 3}
    there = replace(there, profile=replace(there.profile, peaks=peaks))
    assert joined(here, {"two": there}, {}).profile.peaks == {("two/cpu", "nf4"): peaks["cpu", "nf4"]}
