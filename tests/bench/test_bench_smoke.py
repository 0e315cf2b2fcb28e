"""Every benchmark runs at toy size, so that none is found broken on the day it is needed; and two promised times."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import splitrun
from splitrun.__main__ import main
from splitrun.bench import contest, foreign, own
from splitrun.bench.terms import Result, Terms
from splitrun.errors import InvalidRequest
from splitrun.measure import timing

FIGURES = ("ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s", "load_s")


def test_bench_beside_the_others_on_random_weights_over_two_workers(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "demo", "--prompt-tokens", "20", "--new-tokens", "4", "--repeat", "1", "--weights", "bf16"]
    words += ["--load", "dummy", "--memory", "cpu=1GiB,cpu:1=26MiB", "--vs", "transformers", "--vs", "accelerate"]
    assert main([*words, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    figures = json.loads(lines[0])
    check(figures, *figures["vs"].values())
    predicted = figures["predicted"]
    assert predicted["ttft_s"] > 0
    assert predicted["decode_at_least"] <= predicted["decode_tokens_per_s"] <= predicted["decode_at_most"]
    assert all(result["peak_bytes"]["cpu"] > 0 for result in (figures, *figures["vs"].values()))
    assert set(figures["devices"]) <= {"cpu", "cpu:1"}
    assert set(figures["vs"]) == {"transformers", "accelerate"}
    assert figures["vs"]["transformers"]["ratios"]["decode"] > 0


@pytest.mark.parametrize("play", [own.play, foreign.play], ids=["splitrun", "foreign"])
def test_contestants_load_a_real_model(play: Callable[[Terms], Result], tmp_path: Path) -> None:
    placement = splitrun.plan("demo", memory={"cpu": "1GiB"}, context=32, weights="bf16")
    placement.save(tmp_path / "placement.yaml")
    terms = contest.make_terms(placement, tmp_path / "placement.yaml", 20, 4, 1, "weights")
    for name in ("splitrun",) if play is own.play else contest.FOREIGN:
        check(play(replace(terms, contestant=name)).to_json())


def test_bitsandbytes_needs_the_weights(tmp_path: Path) -> None:
    placement = splitrun.plan("demo", memory={"cpu": "1GiB"}, context=32, weights="bf16")
    placement.save(tmp_path / "placement.yaml")
    terms = contest.make_terms(placement, tmp_path / "placement.yaml", 20, 4, 1, "dummy")
    with pytest.raises(InvalidRequest, match="leave --load dummy out"):
        foreign.play(replace(terms, contestant="bitsandbytes"))


def check(*results: Mapping[str, Any]) -> None:
    """Everybody did the whole task and has figures."""
    for result in results:
        assert result["error"] is None
        assert (result["prompt_tokens"], result["new_tokens"]) == (20, 4)
        assert all(result[name] > 0 for name in FIGURES)


def test_quality_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "POINT_SECONDS", 0.0)
    assert main(["bench", "demo", "--quality", "--questions", "8", "--json"]) == 0
    shares = {weights: entry["share"] for weights, entry in json.loads(capsys.readouterr().out).items()}
    assert set(shares) == {"fp32", "bf16", "fp16", "int8", "nf4"}
    assert min(shares.values()) > 0


def test_hops_between_processes() -> None:
    script = Path(__file__).with_name("hops.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(splitrun.__file__).parent.parent)}
    command = [sys.executable, str(script), "--quick"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    figures = json.loads(outcome.stdout.splitlines()[-1])
    assert set(figures) == {"decode", "prefill_512"}
    assert all(figure["hop_ms"] > 0 for figure in figures.values())


def least_processor_seconds(command: list[str]) -> float:
    """What a command takes at its best of five times, whatever else the machine does."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_answers_within_half_a_second() -> None:
    assert least_processor_seconds([sys.executable, "-m", "splitrun", "--help"]) < 0.5


def test_import_takes_less_than_50_ms() -> None:
    bare, loaded = (least_processor_seconds([sys.executable, "-c", code]) for code in ("", "import splitrun"))
    assert loaded - bare < 0.05
