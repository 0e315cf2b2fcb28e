"""The bench's arithmetic, memory meter and processes, without a model."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from splitrun.bench import contest, memory
from splitrun.bench.quality import Quality, to_text
from splitrun.bench.terms import Result, Round, Terms, ratios, summarise
from splitrun.errors import DoesNotFit

GIB, MIB = 1 << 30, 1 << 20
MACHINE: Any = SimpleNamespace()
TERMS = Terms("splitrun", "demo", "plan.yaml", prompt_tokens=100, new_tokens=11, vocabulary=50)


def result(name: str = "splitrun", **changes: Any) -> Result:
    rates = {"ttft_s": 0.5, "prefill_tokens_per_s": 200.0, "decode_tokens_per_s": 20.0, "load_s": 2.0}
    return Result(name, 100, 11, **({"peak_bytes": {"cpu": GIB}} | rates | changes))


def test_a_summary_takes_medians() -> None:
    rounds = [Round(0.5, 1.5, 11), Round(0.4, 1.4, 11), Round(5.0, 25.0, 11)]
    found = summarise(TERMS, 2.0, rounds, {"cpu": GIB}, {"cpu": "everything"})
    assert (found.ttft_s, found.decode_tokens_per_s, found.prefill_tokens_per_s) == (0.5, 10.0, 200.0)
    assert (found.new_tokens, found.error) == (11, None)


def test_one_token_has_no_decoding_rate() -> None:
    assert summarise(TERMS, 1.0, [Round(0.5, 0.5, 1)], {}, {}).decode_tokens_per_s == 0.0


def test_prompts_differ_by_round_and_are_the_same_for_everyone() -> None:
    prompts = [TERMS.prompt(number) for number in range(3)]
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert prompts[1] == Terms(**(TERMS.to_json() | {"contestant": "accelerate"})).prompt(1)
    assert all(len(prompt) == 100 and set(prompt) <= set(range(50)) for prompt in prompts)


def test_ratios_above_1_are_ours() -> None:
    other = result("accelerate", ttft_s=1.0, decode_tokens_per_s=5.0, prefill_tokens_per_s=400.0, load_s=1.0)
    assert ratios(result(), other) == {"decode": 4.0, "prefill": 0.5, "first_token": 2.0, "load": 0.5, "memory": 1.0}
    assert ratios(result(), result(error="refused")) == {}


def test_json_and_table_name_everyone() -> None:
    results = [result(), result("accelerate"), result("transformers", error="out of memory")]
    shown = contest.to_json(results)
    assert shown["contestant"] == "splitrun"
    assert set(shown["vs"]) == {"accelerate", "transformers"}
    assert shown["vs"]["accelerate"]["ratios"]["decode"] == 1.0
    assert json.loads(json.dumps(shown)) == shown
    assert shown["predicted"] is None
    table = contest.to_table(results).splitlines()
    assert table[1].split()[0] == "splitrun"
    assert "1.00 GiB" in table[1]
    assert table[3].endswith("failed: out of memory")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "most likely for memory"),
        ("pass", "no result"),
    ],
)
def test_a_contestant_that_dies_has_an_error(code: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run

    def other(command: list[str], **options: Any) -> Any:
        return run([sys.executable, "-c", code], **options)

    monkeypatch.setattr(contest.subprocess, "run", other)
    (died,) = contest.hold(TERMS, [])
    assert message in str(died.error)


def test_a_contestant_that_refuses_says_why() -> None:
    (refused,) = contest.hold(Terms("splitrun", "demo", "/no/such/plan.yaml", 4, 2, vocabulary=10), [])
    assert "/no/such/plan.yaml" in str(refused.error)


class FakeCard:
    """A card whose driver reports ``free``; torch reserved at most ``reserved`` bytes."""

    def __init__(self, reserved: int, total: int = 8 * GIB) -> None:
        self.reserved, self.total = reserved, total
        self.fraction = 0.0
        self.frees = [7 * GIB]
        self.now: int | None = None

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(uuid="u")

    def max_memory_reserved(self, index: int) -> int:
        return self.reserved

    def memory_reserved(self, index: int) -> int:
        return self.reserved if self.now is None else self.now

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return self.frees[-1], self.total

    def set_per_process_memory_fraction(self, fraction: float, index: int) -> None:
        self.fraction = fraction


def meter(card: FakeCard, budget: int, monkeypatch: pytest.MonkeyPatch) -> memory.MemoryMeter:
    monkeypatch.setattr(memory, "survey", lambda machine, compute: SimpleNamespace(contexts={"cuda:0": 300 * MIB}))
    machine: Any = SimpleNamespace(torch=SimpleNamespace(cuda=card), driver_free=lambda uuid: card.frees[-1])
    return memory.MemoryMeter({"cuda:0": budget, "cpu": GIB}, machine)


def test_a_card_is_held_to_its_budget_less_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCard(reserved=GIB)
    found = meter(card, 2 * GIB, monkeypatch)
    assert card.fraction == pytest.approx((2 * GIB - 300 * MIB) / (8 * GIB))
    assert found.peak_bytes()["cuda:0"] == GIB + 300 * MIB
    card.frees.append(7 * GIB - 3 * GIB)  # the driver knows of more than torch does
    card.now = GIB // 2  # some of it was given back
    assert found.peak_bytes()["cuda:0"] == 3 * GIB + GIB // 2
    card.frees.append(7 * GIB - GIB // 2 - 100 * MIB)  # a context smaller than the one that was measured
    assert found.peak_bytes()["cuda:0"] == GIB + 100 * MIB
    card.frees.append(8 * GIB)  # another process gave memory back
    assert found.peak_bytes()["cuda:0"] == GIB + 300 * MIB
    assert (found.context_bytes("cuda:0"), found.context_bytes("cpu")) == (300 * MIB, 0)


def test_a_budget_below_the_context_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DoesNotFit, match="does not even hold") as caught:
        meter(FakeCard(0), 200 * MIB, monkeypatch)
    assert caught.value.shortfall_bytes == {"cuda:0": 100 * MIB}


def test_main_memory_is_counted_above_the_start() -> None:
    found = memory.MemoryMeter({"cpu": GIB}, MACHINE)
    held = bytearray(64 * MIB)
    held[::4096] = b"x" * len(held[::4096])
    assert found.peak_bytes()["cpu"] >= 48 * MIB


def test_quality_table_says_where_it_missed() -> None:
    entry = Quality("nf4", 4, 3, {"add": (1, 2), "sort": (2, 2)})
    text = to_text([entry])
    assert "3/4" in text
    assert "75.0%" in text
    assert text.endswith("add 1 of 2")
