"""Stages on Ray nodes: the same ids as in one process, whatever becomes of stages, nodes and the coordinator."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from cut_models import NEW_TOKENS, TinyModel, tiny_model
from node_clusters import TestCluster, cluster, listening, shown
from pauses import MOST_S, Pause
from test_processes import GREEDY, SAMPLED, at_step, cut_everywhere, demo, plan, remote_of, restarts, run
from test_recovery import IN_FLIGHT, OUTPUTS, PROMPTS, computed

import splitrun
from splitrun.cluster import links, node, runtime
from splitrun.cluster import nodes as cluster_nodes
from splitrun.cluster.home import Home
from splitrun.cluster.nodes import Membership, Nodes
from splitrun.cluster.versions import own_versions
from splitrun.engine import succession
from splitrun.engine.patience import Patience
from splitrun.errors import ClusterError, InvalidPlacement, StageError, StageLost
from splitrun.planner.facts import Workload
from splitrun.schedule.step import Step
from splitrun.transport.frames import Frame, Kind
from splitrun.transport.socket import SocketMailbox

PATIENCE = Patience(beat_s=0.25, dead_after_s=2.0, start_s=60.0, stall_s=7.0)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with cluster(tmp_path_factory.mktemp("nodes"), "one", "two") as made:
        yield made


@pytest.fixture(scope="module")
def expected() -> dict[str, list[tuple[int, ...]]]:
    """What one process answers when nothing disturbs it."""
    with splitrun.Engine(demo("cpu"), chunk_tokens=16) as engine:
        return {"greedy": run(engine), "sampled": run(engine, SAMPLED)}


@pytest.fixture(scope="module")
def engine(nodes: TestCluster) -> Iterator[splitrun.Engine]:
    """First and last stage on nodes, the middle here."""
    with splitrun.Engine(demo("one/cpu", "cpu", "two/cpu"), chunk_tokens=16, patience=PATIENCE) as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


def answers(placement: splitrun.Placement, model: TinyModel) -> list[tuple[int, ...]]:
    sampling = splitrun.SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    with splitrun.Engine(placement, chunk_tokens=8, patience=PATIENCE) as engine:
        return [completion.token_ids for completion in engine.generate(model.prompts, sampling)]


@pytest.mark.parametrize("cut", [0, *(pytest.param(cut, marks=pytest.mark.long) for cut in (1, 2, 3, 4))])
def test_every_cut_over_two_nodes(
    nodes: TestCluster, model: TinyModel, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages are away: activations go from node to node, and only tokens come here. 0 is every cut at once. From
    here the relative path leads to the model, and to nothing from where the nodes run: they receive what they compute.
    """
    assert model.layers == 3
    monkeypatch.chdir(model.path.parent)
    workload = Workload(64, sessions=3, block_tokens=4)
    source = str(model.path) if cut == 1 else f"./{model.path.name}"
    if cut == 0:
        placement = cut_everywhere(source, model.layers, ("one/cpu", "two/cpu"), workload)
    else:
        placement = plan(source, model.layers, {"one/cpu": cut, "two/cpu": model.layers + 2}, workload)
    assert answers(placement, model) == list(model.answers)


def test_the_nodes_answer_as_one(engine: splitrun.Engine, expected: dict[str, Any]) -> None:
    assert run(engine) == expected["greedy"]
    assert run(engine, SAMPLED) == expected["sampled"]
    assert [stage.node for stage in engine.core.status().stages] == ["one", "", "two"]


def test_a_stage_on_a_node_waits_for_no_other_process(nodes: TestCluster, engine: splitrun.Engine) -> None:
    """Ray would start it as something that anything else comes before."""
    own = psutil.Process().nice()
    assert all(stage.nice() <= own for name in ("one", "two") for stage in nodes.stages(name))


FAULTS = [(number, name, step) for number in (signal.SIGKILL, signal.SIGSTOP) for name in ("one", "two")
          for step in (1, 5, 21)]  # fmt: skip
"""Signal, whose stage, and behind which step: the first chunk of the prompts, a later one, or decoding."""
IN_CI = (signal.SIGSTOP, "one", 5)


@pytest.mark.parametrize(
    ("number", "name", "step"), [pytest.param(*one, marks=() if one == IN_CI else pytest.mark.long) for one in FAULTS]
)
def test_no_token_is_lost_with_a_stage(
    nodes: TestCluster, engine: splitrun.Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    number: int, name: str, step: int,
) -> None:  # fmt: skip
    before, pause = restarts(engine), Pause(engine, monkeypatch)
    (lost,) = nodes.stages(name)
    at_step(engine, monkeypatch, step, pause.of(lambda: lost.send_signal(number)))
    kind, sampling = ("sampled", SAMPLED) if step == 5 else ("greedy", GREEDY)
    assert run(engine, sampling) == expected[kind]
    assert restarts(engine) > before
    assert not lost.is_running()
    assert pause.beyond_loading_s < MOST_S


@pytest.mark.long
def test_the_whole_table_in_nf4(nodes: TestCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same faults, where equality rests on the kernels: each row's bits are its own."""
    with splitrun.Engine(demo("cpu", weights="nf4"), chunk_tokens=16) as engine:
        expected = {"greedy": run(engine), "sampled": run(engine, SAMPLED)}
    before = {process.pid for name in ("one", "two") for process in nodes.stages(name)}
    placement = demo("one/cpu", "cpu", "two/cpu", weights="nf4")
    with splitrun.Engine(placement, chunk_tokens=16, patience=PATIENCE) as engine:
        for number, name, step in FAULTS:
            (lost,) = [process for process in nodes.stages(name) if process.pid not in before]
            at_step(engine, monkeypatch, step, lambda lost=lost, number=number: lost.send_signal(number))
            kind, sampling = ("sampled", SAMPLED) if step == 5 else ("greedy", GREEDY)
            assert run(engine, sampling) == expected[kind], (number, name, step)
        assert restarts(engine) == len(FAULTS)


@pytest.mark.long
def test_a_stage_lost_with_its_keeper_and_again_while_it_starts(
    nodes: TestCluster, engine: splitrun.Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = remote_of(engine)
    start, started = remote._starter, []

    def start_doomed(device: str, job: Any) -> Any:
        started.append(device)
        process = start(device, job)
        if len(started) == 1:
            process.expect("address", 60)
            nodes.stages("two")[0].kill()
        return process

    monkeypatch.setattr(remote, "_starter", start_doomed)
    (stage,) = nodes.stages("two")
    keeper = stage.parent()  # those of engines that have ended may still be about it
    assert keeper is not None
    at_step(engine, monkeypatch, 7, keeper.kill)
    assert run(engine) == expected["greedy"]
    assert started == ["two/cpu", "two/cpu"]


def test_no_port_is_open_beyond_the_loopback(nodes: TestCluster, engine: splitrun.Engine) -> None:
    ours = {process.pid for name in ("one", "two") for process in nodes.processes(name)} | {os.getpid()}
    found = {pid: addresses for pid, addresses in listening().items() if pid in ours}
    assert len(found) >= 6
    assert set().union(*found.values()) == {"127.0.0.1"}


def test_keys_and_token_are_in_no_command_line_or_log(nodes: TestCluster, engine: splitrun.Engine) -> None:
    token = nodes.homes["one"].token()
    keys = [address.public_key for address in remote_of(engine)._addresses.values()]
    seen = shown(process for name in ("one", "two") for process in nodes.processes(name))
    assert "stage_process" in seen
    assert not any(secret in seen for secret in [token, *keys])
    folders = {Path("/tmp"), Path(tempfile.gettempdir())}
    logs = [file for folder in folders for root in folder.glob("splitrun-ray-*") for file in root.rglob("*")]
    logs = [file for file in logs if file.is_file()]
    logs += [home.log_file for home in nodes.homes.values()]
    assert len(logs) > 10
    for file in logs:
        text = file.read_text(errors="replace")
        assert not any(secret in text for secret in [token, *keys]), file
    for home in nodes.homes.values():
        assert home.token_file.stat().st_mode & 0o777 == 0o600
        assert home.folder.stat().st_mode & 0o777 == 0o700


def test_a_frame_without_a_key_of_the_session_is_refused(engine: splitrun.Engine, expected: dict[str, Any]) -> None:
    remote = remote_of(engine)
    stranger = SocketMailbox(remote._exchange.route.session, lambda frame: None)
    try:
        stranger.connect("coordinator", remote._mailbox.address)
        stranger.connect("two", remote._addresses["two/cpu"])
        before = remote._mailbox.dropped.counts().get("unknown key", 0)
        for peer in ("coordinator", "two"):
            stranger.send(peer, Frame(Kind.BEAT, remote._exchange.route.session, 0))
        deadline = time.monotonic() + 10
        while remote._mailbox.dropped.counts().get("unknown key", 0) == before:
            assert time.monotonic() < deadline, "nobody refused the stranger"
            time.sleep(0.05)
        assert run(engine) == expected["greedy"]
    finally:
        stranger.close()


def test_ray_prints_nothing(engine: splitrun.Engine, capfd: pytest.CaptureFixture[str]) -> None:
    """Of nodes that die, say: what it does say goes through one function of its own."""
    from ray._private import worker

    assert "print_to_stdstream" in worker.listen_error_messages.__code__.co_names
    worker.print_to_stdstream({"lines": ["a node died"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert capfd.readouterr() == ("", "")


JOB = """
import sys
from pathlib import Path
from splitrun.cluster.runtime import set_environment
set_environment(Path(sys.argv[2]), "127.0.0.1")
import ray
ray.init(address=sys.argv[1], _node_ip_address="127.0.0.1", log_to_driver=False)
print("a job runs")
"""


@pytest.fixture(scope="module")
def job_without_token(nodes: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> subprocess.Popen[str]:
    """A Ray job with another token, begun early: Ray takes its time to give up."""
    record = node.running(nodes.homes["one"])
    assert record is not None
    wrong = Home(tmp_path_factory.mktemp("stranger"))
    wrong.keep_token("0" * 48)
    command = [sys.executable, "-c", JOB, record.head, str(wrong.token_file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_without_the_token_nobody_joins(
    nodes: TestCluster, job_without_token: subprocess.Popen[str], tmp_path: Path
) -> None:
    record = node.running(nodes.homes["one"])
    assert record is not None
    with pytest.raises(ClusterError, match="that is no token"):
        node.join(Home(tmp_path), record.head, "", name="stranger")
    # In another process: Ray reads the token once in the life of one.
    environment = {**os.environ, "SPLITRUN_HOME": str(tmp_path), "SPLITRUN_TOKEN": "0" * 48}
    joining = [sys.executable, "-m", "splitrun", "node", "join", record.head, "--name", "stranger"]
    outcome = subprocess.run(joining, capture_output=True, text=True, timeout=100, env=environment, check=False)
    assert outcome.returncode == 1
    assert f"splitrun: {record.head} refuses the token: copy the whole command" in outcome.stderr


def test_other_versions_are_named_on_both_sides(
    nodes: TestCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = node.running(nodes.homes["one"])
    assert record is not None
    monkeypatch.setattr(node, "own_versions", lambda: {**own_versions(), "torch": "1.0"})
    with pytest.raises(ClusterError, match=r"three and one do not match: torch 1\.0 here, \S+ there: install the same"):
        node.join(Home(tmp_path), record.head, nodes.homes["one"].token(), name="three")
    told = Membership(nodes.homes["one"]).refused()
    assert told["three"]["differences"][0].startswith("torch 1.0 here")


SCRIPT = """
import sys, splitrun
engine = splitrun.Engine(sys.argv[1])
print("up", flush=True)
sys.stdin.read()
"""


def test_the_coordinators_death_ends_stages_on_nodes(nodes: TestCluster, tmp_path: Path) -> None:
    file = tmp_path / "placement.yaml"
    demo("cpu", "two/cpu").save(file)
    before = {process.pid for process in nodes.stages("two")}
    environment = {**os.environ, "PYTHONPATH": str(Path(splitrun.__file__).parent.parent)}
    coordinator = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        text=True,
    )  # fmt: skip
    with coordinator:
        assert coordinator.stdout is not None
        assert coordinator.stdout.readline() == "up\n"
        (child,) = [process for process in nodes.stages("two") if process.pid not in before]
        coordinator.kill()
        child.wait(timeout=5)


def after_steps(engine: splitrun.Engine, count: int, deed: Callable[[], None]) -> None:
    """Do something on another thread once that many more steps were submitted."""
    pipeline = engine.core._pipeline
    submit, seen = pipeline.submit, [0]

    def counted(step: Step) -> None:
        submit(step)
        seen[0] += 1
        if seen[0] == count:
            threading.Thread(target=deed).start()

    pipeline.submit = counted  # type: ignore[method-assign]


@pytest.mark.parametrize("killed", [True, pytest.param(False, marks=pytest.mark.long)], ids=["killed", "stopped"])
def test_a_whole_node_is_lost_and_comes_back(
    nodes: TestCluster, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """The streams go on here, the other stage computes nothing again, and the lost one moves back under load when the
    node has joined again; no token is lost."""
    monkeypatch.setattr(succession, "RETURN_S", 0.3)
    nodes.start("three")
    (left,) = runtime._temporary().glob(f"splitrun-ray-{nodes.processes('three')[0].pid}-*")
    placement = demo("cpu", "three/cpu")
    with splitrun.Engine(placement, chunk_tokens=16, patience=PATIENCE, rebalance=True) as engine:
        first, pipeline = engine.core.pipeline.links[0].stage, engine.core.pipeline
        after_steps(engine, 9, lambda: nodes.lose("three") if killed else node.stop(nodes.homes["three"]))
        assert run(engine, SAMPLED) == expected["sampled"]
        assert [stage.device for stage in engine.core.status().stages] == ["cpu", "cpu"]
        assert [spec["device"] for spec in engine.core.status().placement["stages"]] == ["cpu", "cpu"]
        assert engine.core.pipeline is pipeline
        assert engine.core.pipeline.links[0].stage is first
        assert 0 <= computed(engine, 0) - PROMPTS - OUTPUTS <= IN_FLIGHT
        assert run(engine) == expected["greedy"]
        assert remote_of(engine)._kept.nbytes == 0
        assert engine.core.status().healthy
        assert left.is_dir() == killed
        nodes.start("three")
        assert not left.exists()
        deadline = time.monotonic() + 60
        while [stage.device for stage in engine.core.status().stages] != ["cpu", "three/cpu"]:
            assert time.monotonic() < deadline, "the node is back and not used"
            assert run(engine) == expected["greedy"]
        assert run(engine) == expected["greedy"]
        assert engine.core.status().healthy
    node.stop(nodes.homes["three"])


@pytest.mark.long
def test_a_node_that_stands_still_is_not_taken_for_one_that_is_back(
    nodes: TestCluster, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its system accepts connections and Ray counts it in: nothing is closed here before a process runs there."""
    monkeypatch.setattr(succession, "RETURN_S", 0.1)
    nodes.start("three")
    with splitrun.Engine(demo("cpu", "three/cpu"), chunk_tokens=16, patience=PATIENCE, rebalance=True) as engine:
        pipeline, frozen = engine.core.pipeline, nodes.processes("three")
        after_steps(engine, 9, lambda: nodes.lose("three", signal.SIGSTOP))
        assert run(engine, SAMPLED) == expected["sampled"]
        until = time.monotonic() + 4
        while time.monotonic() < until:
            assert run(engine) == expected["greedy"]
        assert engine.core.pipeline is pipeline
        assert [stage.device for stage in engine.core.status().stages] == ["cpu", "cpu"]
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + 90
        while [stage.device for stage in engine.core.status().stages] != ["cpu", "three/cpu"]:
            assert time.monotonic() < deadline, "the node is back and not used"
            assert run(engine) == expected["greedy"]
        assert run(engine) == expected["greedy"]
    node.stop(nodes.homes["three"])


def test_what_fits_nowhere_else_ends_with_503(nodes: TestCluster) -> None:
    """The keeper stands still, the stage ends itself, and the node does not answer. What remains has room for half."""
    before = {process.pid for process in [*nodes.keepers("two"), *nodes.stages("two")]}
    placement = replace(demo("cpu", "two/cpu"), devices={"cpu": 26 << 20})
    with splitrun.Engine(placement, chunk_tokens=16, patience=PATIENCE) as engine:
        (keeper,) = [process for process in nodes.keepers("two") if process.pid not in before]
        (stage,) = [process for process in nodes.stages("two") if process.pid not in before]
        keeper.suspend()
        deadline = time.monotonic() + 7
        while stage.status() != psutil.STATUS_ZOMBIE:  # its parent cannot take note of its end now
            assert time.monotonic() < deadline, "the stage outlives what its keeper can do"
            time.sleep(0.1)
        with pytest.raises(StageError, match="does not fit") as caught:
            run(engine)
        assert caught.value.http_status == 503
        with pytest.raises(StageLost):
            run(engine)
        assert not engine.core.status().healthy
        keeper.kill()


def test_a_plan_sees_every_node(nodes: TestCluster) -> None:
    """Neither what is here nor the node that is named has room for the whole model beside a process."""
    told: list[str] = []
    asked: dict[str, Any] = {"context": 256, "sessions": 32, "weights": "fp32"}
    whole = splitrun.plan("demo", memory={"cpu": "2GiB"}, **asked)
    assert whole.estimate is not None
    (bill,) = whole.estimate.devices
    # what steps take is measured on each node for itself, and differs by megabytes: the node lacks half of all layers
    layers = bill.weight_bytes + bill.kv_bytes
    budgets = {"cpu": bill.total_bytes - layers // 4, "two/cpu": bill.total_bytes - layers // 2}
    placement = splitrun.plan("demo", memory=budgets, **asked, nodes=True, report=told.append)
    assert set(placement.device_names) == {"cpu", "two/cpu"}
    assert "measuring two" in told
    assert placement.estimate is not None
    taken = {memory.device: memory for memory in placement.estimate.devices}
    assert taken["two/cpu"].context_bytes == taken["cpu"].context_bytes > 0
    assert all(memory.total_bytes <= memory.budget_bytes for memory in taken.values())
    with pytest.raises(InvalidPlacement, match="node three, which is not there"):
        splitrun.plan("demo", memory={"cpu": "1GiB", "three/cpu": "1GiB"}, context=256, nodes=True)


def test_the_check_names_every_node(nodes: TestCluster) -> None:
    from splitrun.cluster.links import check_nodes

    lines = {name: (line, fault) for name, line, fault in check_nodes(Nodes())}
    assert lines["one"] == ("here", False)
    assert lines["two"][0].startswith("good: ")


def test_what_is_said_late_is_not_lost(nodes: TestCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow line each answer comes after the time that is waited for it; its end comes late too."""
    from ray.exceptions import GetTimeoutError

    waited, late = cluster_nodes.waited, list[Any]()

    def slow(reference: Any, most_s: float) -> Any:
        found = waited(reference, most_s)
        if reference not in late:
            late.append(reference)
            raise GetTimeoutError
        return found

    monkeypatch.setattr(cluster_nodes, "waited", slow)
    job = {"session": 1, "own": "two", "host": "127.0.0.1", "ports": [49152, 65535]}
    process = Nodes().start("two/cpu", job, links.MODULE)
    try:
        endpoint, _ = process.expect("address", 20)
    finally:
        process.end_quietly()
    assert endpoint.startswith("tcp://127.0.0.1:")


LEAVING = """
from splitrun.cluster import links
from splitrun.cluster.nodes import NodeLost, Nodes
found = Nodes()
job = {"session": 1, "own": "two", "host": "127.0.0.1", "ports": [49152, 65535]}
processes = [found.start("two/cpu", job, links.MODULE) for _ in range(3)]
for process in processes:
    process.expect("address", 60)
import ray
ray.shutdown()
for process in processes:
    process._thread.join(timeout=60)
    assert not process._thread.is_alive(), "a thread waits for ever"
    assert process.end
    process.tell({"peers": {}})
    process.kill()
try:
    found.start("two/cpu", job, links.MODULE)
except NodeLost as error:
    print(error)
assert not ray.is_initialized()
"""


def test_leaving_the_cluster_ends_what_waits_for_it(nodes: TestCluster) -> None:
    """Threads that wait inside Ray may never come back then, and a later call would start a cluster of its own. In a
    process that has nothing else to do with the cluster: the engine of other tests would join it again to compute what
    it has lost."""
    environment = {**os.environ, "PYTHONPATH": str(Path(splitrun.__file__).parent.parent)}
    outcome = subprocess.run(
        [sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=150, env=environment, check=False
    )
    assert outcome.stdout == "two/cpu: this process has left the cluster\n", outcome.stderr[-2000:]


def test_without_the_token_no_job_runs(job_without_token: subprocess.Popen[str]) -> None:
    output, errors = job_without_token.communicate(timeout=100)
    assert job_without_token.returncode != 0
    assert "a job runs" not in output
    assert "InvalidAuthToken" in errors
