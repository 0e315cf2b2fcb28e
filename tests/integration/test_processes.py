"""Stages in processes of their own: the same ids as in one process, whatever becomes of the processes meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from cut_models import NEW_TOKENS, TinyModel, tiny_model, write_checkpoint
from pauses import MOST_S, Pause

import splitrun
from splitrun import api
from splitrun.cluster.process import StageProcess
from splitrun.engine.patience import Patience
from splitrun.engine.remote import RemoteStages
from splitrun.errors import ClusterError, CorruptWeights, InvalidPlacement, StageError, StageLost
from splitrun.kernels.cpu.library import kernel
from splitrun.planner.facts import Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec
from splitrun.schedule.step import Step
from splitrun.transport.frames import Frame

LAYERS = 8
PATIENCE = Patience(beat_s=0.25, dead_after_s=3.0, start_s=60.0, stall_s=4.0)
PROMPTS = [[7 + (3 * index) % 200 for index in range(length)] for length in (90, 3, 41, 20)]
GREEDY = splitrun.SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
SAMPLED = splitrun.SamplingParams(max_tokens=24, temperature=1.5, seed=3, ignore_eos=True, repetition_penalty=1.1)


def plan(model: str, layers: int, devices: Mapping[str, int], workload: Workload, weights: str = "fp32") -> Placement:
    """Stages on these devices; each device's number is the unit behind its last one."""
    stages, start = [], 0
    for device, stop in devices.items():
        inner = (max(start - 1, 0), min(max(stop - 1, 0), layers))
        stages.append(StageSpec(device, start == 0, inner, stop == layers + 2, weights=weights))
        start = stop
    return Placement(1, ModelRef(model, layers=layers), workload, tuple(stages))


def cut_everywhere(model: str, layers: int, devices: tuple[str, str], workload: Workload) -> Placement:
    """Every unit a stage of its own, on the two devices in turn: all cuts at once."""
    stages = tuple(
        StageSpec(devices[unit % 2], unit == 0, inner, unit == layers + 1, weights="fp32")
        for unit, inner in enumerate([(0, 0), *((layer, layer + 1) for layer in range(layers)), (layers, layers)])
    )
    return Placement(1, ModelRef(model, layers=layers), workload, stages)


def demo(*devices: str, weights: str = "fp32") -> Placement:
    """The demo model in equal parts."""
    bounds = {device: (LAYERS + 2) * (index + 1) // len(devices) for index, device in enumerate(devices)}
    return plan("demo", LAYERS, bounds, Workload(256, sessions=4, block_tokens=16), weights)


def run(engine: splitrun.Engine, sampling: splitrun.SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in engine.generate(PROMPTS, sampling)]


def undisturbed() -> dict[str, list[tuple[int, ...]]]:
    """What one process answers when nothing disturbs it."""
    with splitrun.Engine(demo("cpu"), chunk_tokens=16) as engine:
        return {"greedy": run(engine), "sampled": run(engine, SAMPLED)}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[tuple[int, ...]]]:
    return undisturbed()


@pytest.fixture(scope="module")
def engine() -> Iterator[splitrun.Engine]:
    """First and last stage in processes, the middle here."""
    with splitrun.Engine(demo("process/cpu", "cpu", "process-2/cpu"), chunk_tokens=16, patience=PATIENCE) as running:
        yield running


def remote_of(engine: splitrun.Engine) -> RemoteStages:
    remote = engine.core._pipeline._elsewhere
    assert isinstance(remote, RemoteStages)
    return remote


def process_of(engine: splitrun.Engine, device: str) -> StageProcess:
    process = remote_of(engine)._processes[device]
    assert isinstance(process, StageProcess)
    return process


def restarts(engine: splitrun.Engine) -> int:
    return sum(stage.restarts for stage in engine.core.status().stages)


def at_step(engine: splitrun.Engine, monkeypatch: pytest.MonkeyPatch, count: int, deed: Callable[[], None]) -> None:
    """Do something right after the ``count``-th step from now has been submitted."""
    pipeline = engine.core._pipeline
    submit, seen = pipeline.submit, [0]

    def counted(step: Step) -> None:
        submit(step)
        seen[0] += 1
        if seen[0] == count:
            deed()

    monkeypatch.setattr(pipeline, "submit", counted)


def test_two_processes_answer_as_one(engine: splitrun.Engine, expected: dict[str, Any]) -> None:
    assert run(engine) == expected["greedy"]
    assert run(engine, SAMPLED) == expected["sampled"]
    status = engine.core.status()
    assert status.healthy
    assert all(stage.memory_bytes > 0 for stage in status.stages)


FAULTS = [
    (signal.SIGKILL, "process/cpu", 1),
    (signal.SIGKILL, "process-2/cpu", 1),
    (signal.SIGKILL, "process/cpu", 5),
    (signal.SIGKILL, "process-2/cpu", 21),
    (signal.SIGSTOP, "process-2/cpu", 5),
    (signal.SIGSTOP, "process/cpu", 21),
]
"""Signal, which process, and behind which step: the first chunk of the prompts, a later one, or decoding."""


IN_CI = FAULTS[0], FAULTS[4]


@pytest.mark.parametrize(
    ("number", "device", "step"), [pytest.param(*one, marks=() if one in IN_CI else pytest.mark.long) for one in FAULTS]
)
def test_no_token_is_lost_with_a_process(
    engine: splitrun.Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, number: int, step: int,
    device: str,
) -> None:  # fmt: skip
    before, pause = restarts(engine), Pause(engine, monkeypatch)
    lost = process_of(engine, device).process_id
    at_step(engine, monkeypatch, step, pause.of(lambda: os.kill(lost, number)))
    sampling = SAMPLED if step == 5 else GREEDY
    assert run(engine, sampling) == expected["sampled" if step == 5 else "greedy"]
    assert restarts(engine) > before
    assert pause.beyond_loading_s < MOST_S
    assert not psutil.pid_exists(lost)
    assert engine.core.status().healthy
    assert all(use.used == 0 for use in engine.core.status().blocks.values())


@pytest.mark.parametrize("weights", ["nf4", pytest.param("int8", marks=pytest.mark.long)])
def test_a_recovery_repeats_every_bit_of_the_kernels(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row-invariant: lost among prompts and again while decoding, greedy and sampled, alone and in company."""
    if kernel() is None:
        pytest.skip("nothing is compiled here")
    with splitrun.Engine(demo("cpu", weights=weights), chunk_tokens=64) as engine:
        expected = run(engine, SAMPLED)
        alone = engine.generate([PROMPTS[0]], SAMPLED)[0].token_ids
    assert expected[0] == alone
    placement = demo("process/cpu", "cpu", weights=weights)
    with splitrun.Engine(placement, chunk_tokens=64, patience=PATIENCE) as engine:
        for step in (2, 25):
            lost = process_of(engine, "process/cpu").process_id
            at_step(engine, monkeypatch, step, lambda lost=lost: os.kill(lost, signal.SIGKILL))
            assert run(engine, SAMPLED) == expected
        assert restarts(engine) == 2


def test_both_processes_at_once(
    engine: splitrun.Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = [process_of(engine, device).process_id for device in ("process/cpu", "process-2/cpu")]

    def kill_both() -> None:
        for one in lost:
            os.kill(one, signal.SIGKILL)

    at_step(engine, monkeypatch, 9, kill_both)
    assert run(engine) == expected["greedy"]


def test_restarts_leave_no_file_and_no_thread_behind(engine: splitrun.Engine, expected: dict[str, Any]) -> None:
    counts = []
    for _ in range(2):
        os.kill(process_of(engine, "process-2/cpu").process_id, signal.SIGKILL)
        assert run(engine) == expected["greedy"]
        counts.append((psutil.Process().num_fds(), threading.active_count()))
    files, threads = zip(*counts, strict=True)
    assert files[1] <= files[0] + 2  # sockets are closed in the background
    assert threads[1] == threads[0]


def test_a_process_lost_while_it_is_started_again(
    engine: splitrun.Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = remote_of(engine)
    start, started = remote._starter, []

    def start_doomed(device: str, job: Mapping[str, Any]) -> StageProcess:
        process = start(device, job)
        assert isinstance(process, StageProcess)
        started.append(device)
        if len(started) == 1:
            os.kill(process.process_id, signal.SIGKILL)
        return process

    monkeypatch.setattr(remote, "_starter", start_doomed)
    lost = process_of(engine, "process/cpu").process_id
    at_step(engine, monkeypatch, 7, lambda: os.kill(lost, signal.SIGKILL))
    assert run(engine) == expected["greedy"]
    assert started == ["process/cpu", "process/cpu"]


@pytest.mark.parametrize("copies", [0, 2], ids=["lost", "duplicated"])
def test_a_step_lost_or_repeated_on_its_way(
    engine: splitrun.Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    remote, before = remote_of(engine), restarts(engine)
    send, seen = remote._mailbox.send, [0]

    def tampered(peer: str, frame: Frame) -> None:
        seen[0] += 1
        for _ in range(copies if seen[0] == 6 else 1):
            send(peer, frame)

    monkeypatch.setattr(remote._mailbox, "send", tampered)
    assert run(engine) == expected["greedy"]
    assert (restarts(engine) > before) == (copies == 0)


def test_a_last_step_lost_on_its_way(
    engine: splitrun.Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing follows that would show the gap: only that nobody works any more."""
    remote, before = remote_of(engine), restarts(engine)
    send, seen = remote._mailbox.send, []

    def lose_one(peer: str, frame: Frame) -> None:
        seen.append(frame.step)
        if len(seen) != 9:
            send(peer, frame)

    monkeypatch.setattr(remote._mailbox, "send", lose_one)
    completion = engine.generate([PROMPTS[1]], GREEDY)[0]
    assert completion.token_ids == expected["greedy"][1]
    assert restarts(engine) >= before + 2


def test_an_idle_engine_is_left_alone() -> None:
    """Neither the answered nor the failed steps of before count as under way, wherever the head is."""
    patience = Patience(beat_s=0.05, dead_after_s=5.0, start_s=60.0, stall_s=0.6)
    with splitrun.Engine(demo("process/cpu", "cpu"), patience=patience) as engine:
        head = engine.core._pipeline._local[0].stage
        run_head = head.run

        def fail(step: Step, incoming: Any) -> Any:
            raise StageError("planted")

        head.run = fail
        with pytest.raises(StageError, match="planted"):
            engine.generate([PROMPTS[1]], GREEDY)
        assert not wait_for_restart(engine, 1.2)
        head.run = run_head
        engine.generate([PROMPTS[1]], GREEDY)
        assert not wait_for_restart(engine, 1.2)


def wait_for_restart(engine: splitrun.Engine, seconds: float) -> bool:
    """Whether a process is started again within that time."""
    done = threading.Event()

    def noted(device: str, job: Mapping[str, Any]) -> StageProcess:
        done.set()
        return StageProcess(device, job)

    remote_of(engine)._starter = noted
    return done.wait(seconds)


def test_what_cannot_come_back_is_said_once_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with splitrun.Engine(demo("process/cpu", "cpu"), patience=PATIENCE) as engine:
        remote = remote_of(engine)

        def start_nothing(device: str, job: Mapping[str, Any]) -> StageProcess:
            raise OSError(errno.EAGAIN, "no process left")

        monkeypatch.setattr(remote, "_starter", start_nothing)
        lost = process_of(engine, "process/cpu").process_id
        at_step(engine, monkeypatch, 4, lambda: os.kill(lost, signal.SIGKILL))
        with pytest.raises(StageError, match=r"lost for good: .* cannot be started: no process left") as caught:
            run(engine)
        assert caught.value.http_status == 503
        with pytest.raises(StageLost, match="lost for good"):
            run(engine)
        assert not engine.core.status().healthy


WORKLOAD = Workload(256, sessions=4, block_tokens=16)
CUTS = {
    f"at {cut}": plan("demo", LAYERS, {first: cut, second: LAYERS + 2}, WORKLOAD)
    for cut in range(1, LAYERS + 2)
    for first, second in [("cpu", "process/cpu") if cut % 2 else ("process/cpu", "cpu")]
}
EVERYWHERE = cut_everywhere("demo", LAYERS, ("process/cpu", "cpu"), WORKLOAD)


@pytest.mark.parametrize(
    "placement", [EVERYWHERE, *(pytest.param(cut, marks=pytest.mark.long, id=name) for name, cut in CUTS.items())]
)
def test_every_cut_over_two_processes(placement: Placement, expected: dict[str, Any]) -> None:
    with splitrun.Engine(placement, chunk_tokens=16, patience=PATIENCE) as engine:
        assert run(engine) == expected["greedy"]


@pytest.fixture(scope="module", params=["qwen3_next", "gemma2", pytest.param("deepseek_v3", marks=pytest.mark.long)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """States, windows, latent attention."""
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def test_other_architectures_over_processes(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = {"process/cpu": 2, "cpu": model.layers + 2}
    placement = plan(str(model.path), model.layers, devices, Workload(64, sessions=3, block_tokens=4))
    sampling = splitrun.SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    with splitrun.Engine(placement, chunk_tokens=8, patience=PATIENCE) as engine:
        lost = process_of(engine, "process/cpu").process_id
        at_step(engine, monkeypatch, 6, lambda: os.kill(lost, signal.SIGKILL))
        completions = engine.generate(model.prompts, sampling)
        assert [completion.token_ids for completion in completions] == list(model.answers)
        assert restarts(engine) >= 1


def test_closing_during_a_recovery_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = splitrun.Engine(demo("process/cpu", "cpu"), patience=PATIENCE)
    remote, starting = remote_of(engine), threading.Event()
    start, made = remote._starter, []

    def noted(device: str, job: Mapping[str, Any]) -> StageProcess:
        process = start(device, job)
        assert isinstance(process, StageProcess)
        made.append(process)
        starting.set()
        return process

    monkeypatch.setattr(remote, "_starter", noted)
    os.kill(process_of(engine, "process/cpu").process_id, signal.SIGKILL)
    assert starting.wait(30)
    engine.close()
    assert [process.end for process in made] == ["was ended by signal 9"]


SCRIPT = """
import sys, splitrun
from splitrun.engine.remote import RemoteStages
engine = splitrun.Engine(sys.argv[1])
print(engine.core._pipeline._elsewhere._processes["process/cpu"].process_id, flush=True)
sys.stdin.read()
"""


def test_the_coordinators_death_ends_its_processes(tmp_path: Path) -> None:
    file = tmp_path / "placement.yaml"
    demo("cpu", "process/cpu").save(file)
    package_home = str(Path(splitrun.__file__).parent.parent)
    coordinator = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": package_home},
        text=True,
    )
    with coordinator:
        assert coordinator.stdout is not None
        child = psutil.Process(int(coordinator.stdout.readline()))
        assert "stage_process" in " ".join(child.cmdline())
        keys = [part for part in [*child.cmdline(), *child.environ().values()] if "tcp://" in part]
        assert keys == []
        coordinator.kill()
        child.wait(timeout=5)


def test_a_process_says_why_it_cannot_load(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    placement = plan(str(tmp_path), 3, {"process/cpu": 2, "cpu": 5}, Workload(64, 1, block_tokens=4))
    with pytest.raises(CorruptWeights, match=r"model\.safetensors"):
        splitrun.Engine(placement, patience=PATIENCE)


def test_another_model_on_a_node_is_named_on_both_sides(
    engine: splitrun.Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    """To the coordinator, and on the process's own standard error, which is Ray's log on a node."""
    job = dict(remote_of(engine)._jobs["process-2/cpu"])
    job["model"] = {"source": "demo", "revision": None, "fingerprint": "sha256:another", "weights": True}
    process = StageProcess("process-2/cpu", job)
    try:
        with pytest.raises(
            ClusterError, match=r"demo is another model for process-2/cpu \(sha256:.* than on the coord"
        ):
            process.expect("loaded", 60)
    finally:
        process.kill()
    assert "demo is another model for process-2/cpu" in capfd.readouterr().err


def test_checking_knows_processes_of_this_machine() -> None:
    api.check(demo("process/cpu", "cpu", "process-2/cpu:1"))
    for device in ("process/cuda:99", "laptop/cpu"):
        with pytest.raises(InvalidPlacement, match=f"{device} is not here"):
            api.check(demo("cpu", device))


def test_a_node_without_a_cluster_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITRUN_HOME", str(tmp_path))
    with pytest.raises(InvalidPlacement, match="on laptop/cpu: this machine is no node yet: run 'splitrun node start'"):
        splitrun.Engine(demo("laptop/cpu", "cpu"))
