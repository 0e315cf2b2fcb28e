"""Temporary bytes: seen while something runs, and lines through what was seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planner_models import device, model

from splitrun.kernels.cpu.settings import LEVEL_VARIABLE, PROMPT_VARIABLE
from splitrun.measure import resident
from splitrun.measure.lines import Found, unit_peak
from splitrun.measure.peaks import held_bytes, peak_beyond, peak_of
from splitrun.measure.resident import reset_high_water
from splitrun.measure.timing import Sample
from splitrun.measure.unit_steps import Point
from splitrun.measure.versions import versions
from splitrun.planner.facts import Workload
from splitrun.planner.memory import workspace_bytes
from splitrun.planner.peaks import RowsPeak, UnitPeak
from splitrun.planner.seconds import DOUBLING, DecodeLine, DeviceSeconds, UnitSeconds

MIB = 1 << 20
needs_marks = pytest.mark.skipif(not reset_high_water(), reason="this system does not forget its high-water mark")


@needs_marks
def test_a_rise_is_seen_and_what_is_held_is_not() -> None:
    held = torch.ones(16 * MIB, dtype=torch.uint8)
    before = held_bytes("cpu", "cpu")
    rise = peak_of(lambda: torch.ones(64 * MIB, dtype=torch.uint8), "cpu", "cpu", before)
    assert 60 * MIB < rise < 80 * MIB
    assert peak_of(held.max, "cpu", "cpu", held_bytes("cpu", "cpu")) < 8 * MIB


@pytest.mark.parametrize("already", [0, 5000])
def test_only_new_objects_are_looked_at_even_where_some_were_frozen(
    monkeypatch: pytest.MonkeyPatch, already: int
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(resident.gc, "get_freeze_count", lambda: already)
    for name in ("collect", "freeze", "unfreeze"):
        monkeypatch.setattr(resident.gc, name, lambda name=name: calls.append(name))
    with resident.only_new_objects():
        assert calls == ["collect", "freeze"]
    assert ("unfreeze" in calls) == (already == 0)


@needs_marks
def test_what_stays_is_no_peak() -> None:
    kept: list[torch.Tensor] = []

    def load() -> None:
        torch.ones(64 * MIB, dtype=torch.uint8)
        kept.append(torch.ones(32 * MIB, dtype=torch.uint8))

    assert 24 * MIB < peak_beyond(load, "cpu", "cpu") < 48 * MIB


def test_lines_through_what_was_seen() -> None:
    seen = {
        Point(1, 1, 100): 10, Point(1, 1, 1100): 1010, Point(4, 1, 100): 40, Point(4, 1, 600): 2040,
        Point(1, 32, 0): 300, Point(1, 512, 0): 5100, Point(1, 512, 1024): 5000, Point(1, 512, 3584): 9100,
    }  # fmt: skip
    found = Found({point: Sample(1e-3, 0.1, size) for point, size in seen.items()}, 7)
    peak = unit_peak(found, list(seen))
    assert peak.load_bytes == 7
    assert peak.chunks == ((32, 300), (512, 5100))
    assert peak.histories == ((0, 5100), (1024, 5100), (3584, 9100))  # noise does not make it fall
    assert peak.decode == (RowsPeak(1, 0.0, 1.0), RowsPeak(4, 0.0, 4.0))


@pytest.mark.parametrize(
    ("chunk", "sessions", "context", "kept", "expected"),
    [
        (512, 1, 512, 512, 5100),
        (512, 1, 1024 + 512, 1 << 20, 5100),
        (512, 1, 3584 + 512, 1 << 20, 9100),
        (512, 1, 3584 + 512, 1024, 5100),  # a window
        (512, 1, 6144 + 512, 1 << 20, 13100),  # on the last line
        (512, 9, 4096, 4096, 9 * 4096),  # decoding everybody takes more
        (32, 1, 32, 32, 900),  # loading does
    ],
)
def test_the_largest_step_decides(chunk: int, sessions: int, context: int, kept: int, expected: int) -> None:
    histories = ((0, 5100.0), (1024, 5100.0), (3584, 9100.0))
    peak = UnitPeak(900, ((32, 300.0), (512, 5100.0)), histories, (RowsPeak(1, 0.0, 1.0),))
    assert peak.bytes_at(chunk, sessions, context, kept) == expected


@pytest.mark.parametrize(("step", "computed"), [(1, 40), (16, 48), (DOUBLING, 64)])
def test_a_short_chunk_takes_what_it_is_filled_to(step: int, computed: int) -> None:
    peak = UnitPeak(0, ((32, 320.0), (512, 5120.0)), ((0, 5120.0),), (RowsPeak(1, 0.0, 0.0),))
    assert peak.bytes_at(512, 1, 40, 40, step=step) == computed * 10
    timed = UnitSeconds((DecodeLine(1, 1e-3, 0.0),), ((32, 1e-3),), chunk_step=step)
    facts = replace(
        model(layers=1),
        peaks={("cpu", "bf16"): (peak,) * 3},
        seconds={("cpu", "bf16"): DeviceSeconds(timed, (timed,) * 3)},
    )
    assert workspace_bytes(facts, 1, device(), "bf16", Workload(context=40), "bf16") == computed * 10


def test_what_chunks_give_back_on_a_processor_serves_no_later_one() -> None:
    histories = ((0, 10.0 * MIB), (1024, 30.0 * MIB))
    peak = UnitPeak(0, ((512, 10.0 * MIB),), histories, (RowsPeak(1, 0.0, 0.0),))
    facts = replace(model(layers=2), peaks={(name, "bf16"): (peak,) * 4 for name in ("cpu", "cuda:0")})
    long = Workload(context=1024 + 512)
    assert workspace_bytes(facts, 1, device("cuda:0", kind="cuda"), "bf16", long, "bf16") == 30 * MIB
    assert workspace_bytes(facts, 1, device(), "bf16", long, "bf16") == 42 * MIB
    assert workspace_bytes(facts, 1, device(), "bf16", Workload(context=512), "bf16") == 10 * MIB


def test_measured_bytes_go_before_shapes() -> None:
    peak = UnitPeak(123 * MIB, ((32, 0.0),), ((0, 0.0),), (RowsPeak(1, 0.0, 0.0),))
    facts = replace(model(layers=2), peaks={("cpu", "bf16"): (peak,) * 4})
    assert workspace_bytes(facts, 1, device(), "bf16", Workload(), "bf16") == 123 * MIB
    assert workspace_bytes(facts, 1, device(), "nf4", Workload(), "bf16") != 123 * MIB


def test_versions_name_what_seconds_depend_on() -> None:
    words = " ".join(versions("cpu"))
    assert f"torch {torch.__version__.partition('+')[0]}" in words
    assert "transformers " in words
    assert "driver" not in words


def test_seconds_hold_for_the_kernels_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (LEVEL_VARIABLE, PROMPT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    usual, card = versions("cpu"), versions("cuda")
    monkeypatch.setenv(LEVEL_VARIABLE, "avx2")
    held = versions("cpu")
    monkeypatch.setenv(PROMPT_VARIABLE, "int8")
    assert len({usual, held, versions("cpu")}) == 3
    assert versions("cuda") == card
