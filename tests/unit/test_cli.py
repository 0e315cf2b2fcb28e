"""The command line: statuses, one line per error, what each command parses, calls and prints. Nothing is loaded."""

import errno
import io
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import splitrun
from splitrun import api
from splitrun.__main__ import _report_unexpected, main, one_line
from splitrun.cli.options import Planning
from splitrun.engine.interface import EngineStatus
from splitrun.errors import ContextTooLong, DoesNotFit, StageLost
from splitrun.planner.facts import Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec

COMMANDS = ("plan", "serve", "run", "bench", "doctor")


@pytest.fixture(autouse=True)
def _hook() -> Iterator[None]:
    """main() replaces the hook for the errors that nobody expects; the tests keep theirs."""
    before = sys.excepthook
    yield
    sys.excepthook = before


def placement(device: str = "cpu", context: int = 64) -> Placement:
    stage = StageSpec(device, True, (0, 2), True, "bf16")
    return Placement(1, ModelRef("demo", layers=2), Workload(context=context), (stage,), {device: 1 << 30})


class FakeTokenizer:
    has_chat_template = True

    def encode(self, text: str) -> list[int]:
        return [1] * len(text)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return [len(messages)] * sum(len(message["content"]) + 10 for message in messages)


class FakeEngine:
    """Notes how it was made and asked, and answers in two pieces."""

    made: list["FakeEngine"]

    def __init__(self, placement: Placement, **options: Any) -> None:
        self.placement, self.options = placement, options
        self.tokenizer = FakeTokenizer()
        self.core = SimpleNamespace(context=placement.workload.context, status=lambda: EngineStatus(True))
        self.asked: list[tuple[list[int], Any]] = []
        self.closed = False
        FakeEngine.made.append(self)

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def stream(self, ids: list[int], sampling: Any) -> Iterator[Any]:
        self.asked.append((ids, sampling))
        yield SimpleNamespace(token_id=5, text="forty")
        yield SimpleNamespace(token_id=None, text="-two")

    def generate(self, prompts: list[list[int]], sampling: Any) -> list[Any]:
        self.asked.append((prompts[0], sampling))
        return [SimpleNamespace(text="42", token_ids=(4, 2), finish_reason="stop", prompt_tokens=len(prompts[0]))]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    FakeEngine.made = []
    monkeypatch.setattr(splitrun, "Engine", FakeEngine, raising=False)
    monkeypatch.setattr(api, "plan", lambda model, **options: placement(context=options["context"] or 64))
    return FakeEngine


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_and_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "splitrun" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nothing"],
        ["plan"],
        ["plan", "demo", "--context", "many"],
        ["plan", "demo", "--context", "0"],
        ["plan", "demo", "--sessions", "9" * 400],
        ["plan", "demo", "--context", "9" * 400],
        ["serve", "demo", "--api-key", ""],
        ["plan", "demo", "--memory", ""],
        ["plan", "demo", "--memory", ","],
        ["plan", "demo", "--weights", "int3"],
        ["run", "demo"],
        ["serve", "demo", "--port", "70000"],
        ["bench", "demo", "--vs", "vllm"],
    ],
)
def test_bad_usage_is_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    if words:
        assert told.startswith("splitrun: ")
        assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (DoesNotFit("1 GiB short on cpu;\n  use --weights nf4", {"cpu": 1 << 30}), 2, "1 GiB short on cpu; use"),
        (StageLost("the worker died"), 1, "the worker died"),
        (ContextTooLong("too long"), 2, "too long"),
    ],
)
def test_an_error_is_one_line_with_its_status(
    error: Exception, status: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(api, "plan", fail)
    assert main(["run", "demo", "hello"]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith(f"splitrun: {text}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    with pytest.raises(type(error)):
        main(["run", "demo", "hello", "--debug"])


def test_debug_after_a_bare_double_dash_is_a_prompt(engine: type[FakeEngine]) -> None:
    assert main(["run", "demo", "--raw", "--", "--debug"]) == 0
    assert len(engine.made[0].asked[0][0]) == len("--debug")


def test_a_first_plan_says_once_what_it_waits_for(
    engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(model: str, **options: Any) -> Placement:
        options["report"]("measuring embed in bf16 on cpu")
        options["report"]("measuring head in bf16 on cpu")
        return placement()

    monkeypatch.setattr(api, "plan", measure)
    assert main(["run", "demo", "hello"]) == 0
    assert capsys.readouterr().err == "measuring this machine, up to a minute; later plans of this model need not\n"


def test_an_interrupt_outside_of_any_command_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _report_unexpected(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == ""


def test_an_interrupt_while_the_interpreter_ends_is_too_late() -> None:
    code = "import signal; from splitrun.__main__ import main; main(); print(signal.getsignal(signal.SIGINT).name)"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "SIG_IGN"


@pytest.mark.parametrize(("file", "told"), [(None, "the output, or the folder"), ("/tmp/x", "no room for /tmp/x: No")])
def test_a_full_disk_is_one_line(
    file: str | None, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)

    monkeypatch.setattr("splitrun.model.packed_folder.entries", full)
    assert main(["cache", "list"]) == 1
    printed = capsys.readouterr().err.strip()
    assert told in printed
    assert "\n" not in printed


def test_standard_input_that_is_no_text_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert main(["run", "demo", "-"]) == 2
    assert capsys.readouterr().err == "splitrun: standard input is not UTF-8 text: byte 2 is 0xff\n"


def test_standard_input_that_is_closed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["run", "demo", "-"]) == 2
    assert capsys.readouterr().err == "splitrun: standard input is closed: give the prompt as an argument\n"


def test_signs_that_the_output_has_no_letters_for_are_replaced(
    engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    output = io.TextIOWrapper(written, encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", output)
    assert main(["plan", "demo", "--memory", "cpu=1GiB"]) == 0
    assert b"Predicted" in written.getvalue()


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "plan", interrupted)
    assert main(["run", "demo", "hello"]) == 130


def test_what_nobody_expected_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    capsys.readouterr()
    sys.excepthook(ValueError, ValueError("odd\nthing"), None)
    assert capsys.readouterr().err == (
        "splitrun: unexpected ValueError: odd thing; the same command with --debug shows where\n"
    )


def test_one_line() -> None:
    assert one_line(" a\n  b\tc ") == "a b c"


def test_run_streams_the_answer_of_the_chat(engine: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "hello", "--context", "100", "--seed", "7", "--system", "Be brief."]) == 0
    assert capsys.readouterr().out == "forty-two\n"
    (made,) = engine.made
    (ids, sampling), *_ = made.asked
    assert ids == [2] * (5 + 9 + 20)
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.0, 7, 100 - len(ids))
    assert made.closed


@pytest.mark.parametrize(("context", "tokens"), [(1000, 256), (12, 7), (3, 1)])
def test_run_asks_for_no_more_than_there_is_room(engine: type[FakeEngine], context: int, tokens: int) -> None:
    assert main(["run", "demo", "hello", "--raw", "--context", str(context)]) == 0
    assert engine.made[0].asked[0][1].max_tokens == tokens


def test_run_as_json(engine: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "hello", "--raw", "--json", "--max-tokens", "3", "--load", "dummy"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.pop("seconds") >= 0
    assert answer == {"text": "42", "token_ids": [4, 2], "finish_reason": "stop", "prompt_tokens": 5}
    assert engine.made[0].options == {"load": "dummy"}
    assert engine.made[0].asked[0][1].max_tokens == 3


def test_run_refuses_bad_sampling_before_it_plans(engine: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "hello", "--top-p", "1.5"]) == 2
    assert capsys.readouterr().err == "splitrun: top_p is 1.5: it must be above 0 and at most 1\n"
    assert not engine.made


def test_run_a_placement_as_it_is(
    engine: type[FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    placement(context=48).save(file)
    checked: list[str] = []
    monkeypatch.setattr(api, "check", lambda plan, name, load, verify: checked.append(name))
    assert main(["run", str(file), "hello"]) == 0
    assert checked == [str(file)]
    assert engine.made[0].placement.workload.context == 48
    capsys.readouterr()
    assert main(["run", str(file), "hello", "--context", "4", "--weights", "nf4"]) == 2
    assert "--context and --weights cannot change" in capsys.readouterr().err
    assert main(["run", str(file), "hello", "--quality", "int8", "--nodes"]) == 2
    assert "--quality and --nodes cannot change" in capsys.readouterr().err
    assert main(["run", str(file), "hello", "--load", "dummy"]) == 0


@pytest.mark.parametrize("command", ["plan", "run", "serve", "trace", "what-if"])
def test_every_command_that_plans_has_the_options_of_planning(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    for field in fields(Planning):
        assert f"--{field.name} " in shown
    assert "--planning" not in shown


def test_plan_prints_saves_and_speaks_json(tmp_path: Path, engine: type[FakeEngine], capsys: Any) -> None:
    monkey = pytest.MonkeyPatch()
    monkey.setattr(splitrun, "plan", api.plan, raising=False)
    try:
        file = tmp_path / "mine.yaml"
        assert main(["plan", "demo", "--memory", "cpu=1GiB", "-o", str(file)]) == 0
        assert f"splitrun serve {file}" in capsys.readouterr().out
        assert Placement.load(file) == placement()
        blank = tmp_path / "one of mine.yaml"
        assert main(["plan", "demo", "--memory", "cpu=1GiB", "-o", str(blank)]) == 0
        command = capsys.readouterr().out.splitlines()[-1].partition("serve it with: ")[2]
        assert shlex.split(command) == ["splitrun", "serve", str(blank)]
        assert main(["plan", "demo", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["stages"][0]["device"] == "cpu"
    finally:
        monkey.undo()


def test_plan_says_when_the_file_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(splitrun, "plan", lambda model, **options: placement(), raising=False)
    (tmp_path / "file").write_text("")
    assert main(["plan", "demo", "-o", str(tmp_path / "file" / "mine.yaml")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "what-if", "profile"])
def test_an_output_that_cannot_be_written_is_refused_before_planning(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*arguments: object, **options: object) -> None:
        raise AssertionError("planned")

    for where in ("plan", "gather_facts"):
        monkeypatch.setattr(api, where, planned)
    monkeypatch.setattr(splitrun, "plan", planned, raising=False)
    os.mkfifo(tmp_path / "pipe.yaml")
    option = "--facts" if command == "profile" else "-o"
    for file, why in (("pipe.yaml", "not a regular file"), ("absent/mine.yaml", "there is no folder"), (".", "folder")):
        assert main([command, "demo", option, str(tmp_path / file)]) == 2
        told = capsys.readouterr().err
        assert why in told
        assert told.startswith("splitrun: ")
        assert told.count("\n") == 1
    assert main(["check", str(tmp_path / "pipe.yaml")]) == 2
    assert "not a regular file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.yaml"]


def test_serve_takes_the_port_before_it_loads(
    engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from splitrun.serve import launcher

    events: list[str] = []

    class FakeServer:
        url, warning = "http://127.0.0.1:8000", "open to everyone"

        def __init__(self, options: launcher.ServeOptions, listener: object) -> None:
            assert isinstance(listener, socket.socket)
            events.append(f"listen {options.served_name} {options.port} {options.api_key}")
            assert not engine.made

        def __enter__(self) -> "FakeServer":
            return self

        def __exit__(self, *error: object) -> None:
            events.append("closed")

        def attach(self, core: Any) -> None:
            events.append("attached")

        def wait_ready(self) -> None:
            events.append("ready")

        def wait(self) -> None:
            events.append("waited")

    monkeypatch.setattr(launcher, "Server", FakeServer)
    monkeypatch.setenv("SPLITRUN_API_KEY", "secret")
    assert main(["serve", "demo", "--port", "0"]) == 0
    assert events == ["listen demo 0 secret", "attached", "ready", "waited", "closed"]
    captured = capsys.readouterr()
    assert "demo · 2 layers" in captured.out
    assert "serving demo at http://127.0.0.1:8000/v1" in captured.out
    assert captured.err == "splitrun: open to everyone\n"


def test_a_taken_port_is_told_before_planning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*arguments: object, **options: object) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr(api, "plan", planned)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "demo", "--port", str(taken.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err


def test_bench_refuses_what_the_plan_has_no_room_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    placement(context=64).save(file)
    assert main(["bench", str(file), "--prompt-tokens", "60", "--new-tokens", "5"]) == 2
    assert "60 + 5 tokens exceed the planned context of 64" in capsys.readouterr().err
    assert main(["bench", str(file), "--context", "128"]) == 2
    assert "is planned already" in capsys.readouterr().err
    assert main(["bench", "other", "--quality"]) == 2


def test_doctor_shows_devices_and_findings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from splitrun.measure import health
    from splitrun.measure.health import Finding

    monkeypatch.setenv("SPLITRUN_CACHE", str(tmp_path))
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["devices"][0]["name"] == "cpu"
    assert report["packages"]["torch"]
    monkeypatch.setattr(health, "findings", lambda *facts: [Finding("ray is not installed", needed=True)])
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "NEEDED: ray is not installed" in shown
    assert "cpu" in shown
    monkeypatch.setattr(health, "required_packages", lambda: [health.Package("torch", None)])
    assert main(["doctor"]) == 1
    assert "torch is not installed" in capsys.readouterr().err
