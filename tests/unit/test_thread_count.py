"""The number of threads where nobody says: which counts are tried, which wins, and when nothing is tried."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make_config

from splitrun.kernels.cpu.library import MOST_ROWS
from splitrun.measure import thread_count
from splitrun.measure.cache import Cache
from splitrun.measure.thread_count import LEAST_BYTES, fastest, settle_threads, thread_counts
from splitrun.measure.timing import Setting, UnitBench
from splitrun.measure.unit_steps import Point
from splitrun.model.cut import CutRange
from splitrun.model.structure import inspect
from splitrun.planner.facts import KVGroup
from splitrun.stage.generic import ThreadCounts

BLOCK_TOKENS = 4


@pytest.fixture(autouse=True)
def own_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two cores of two threads each, and torch's own count again afterwards."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(thread_count, "logical_processors", lambda: 4)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "logical", "environment", "counts"),
    [
        (2, 4, {}, (2, 4, 1)),
        (16, 16, {}, (16, 12, 8)),
        (16, 32, {"OMP_NUM_THREADS": ""}, (16, 32, 12, 8)),
        (1, 1, {}, (1,)),
        (3, 32, {"OMP_NUM_THREADS": "3"}, (3,)),
    ],
)
def test_physical_cores_come_first(
    cores: int, logical: int, environment: dict[str, str], counts: tuple[int, ...]
) -> None:
    assert thread_counts(cores, logical, environment) == counts


@pytest.mark.parametrize(
    ("taken", "share", "winner"),
    [
        ({2: 1.0, 4: 0.99, 1: 1.9}, 1.0, 2),  # not clearly
        ({2: 1.0, 4: 0.9, 1: 0.8}, 0.9, 1),
        ({2: 1.0, 4: 1.0, 1: 1.0}, 1.0, 2),
        ({2: 1.0, 4: 1.0, 1: 0.5}, 0.7, None),  # somebody else had the processor
    ],
)
def test_another_count_must_be_clearly_faster(taken: dict[int, float], share: float, winner: int | None) -> None:
    runs: list[int] = []

    def timed(count: int) -> tuple[float, float]:
        runs.append(count)
        seconds = taken[count] + (5.0 if runs.count(count) == 2 else 0.0)  # a run that was held up decides nothing
        return seconds, seconds * count * share

    assert fastest(timed, tuple(taken)) == winner
    assert runs[:3] == [2, 4, 1]


class _Stage:
    """Notes with how many threads it was run."""

    def __init__(self, nbytes: int = LEAST_BYTES, again: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
        cut = SimpleNamespace(start=0, stop=2, head=True, embed=False)
        self.weight_bytes = nbytes
        self.rules = SimpleNamespace(groups=(KVGroup("full"),), groups_again=again)
        self.model = SimpleNamespace(cut=cut, dtype=dtype, structure=SimpleNamespace(hidden=8))
        self.threads: list[int] = []
        self.thread_counts: ThreadCounts | None = None

    def run(self, step: Any, incoming: torch.Tensor) -> None:
        assert step.rows == 1
        assert incoming.shape == (1, 8)
        self.threads.append(torch.get_num_threads())


def settle(stage: Any, kept: Cache, given: int = 2) -> int:
    return settle_threads([stage], BLOCK_TOKENS, given, kept)


def test_real_steps_decide_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _Stage()
    monkeypatch.setattr(
        thread_count, "fastest", lambda timed, counts: max((timed(count)[0] >= 0, count) for count in counts)[1]
    )
    assert settle(stage, Cache(tmp_path)) == torch.get_num_threads() == 4
    assert stage.threads == [2, 4, 1]
    assert stage.thread_counts == ThreadCounts(decoding=4, prompts=2)
    torch.set_num_threads(2)
    monkeypatch.setattr(thread_count, "fastest", lambda timed, counts: pytest.fail("measured twice"))
    assert settle(stage, Cache(tmp_path)) == torch.get_num_threads() == 4


@pytest.mark.parametrize(
    "stage",
    [_Stage(nbytes=LEAST_BYTES - 1), _Stage(again=False), _Stage(dtype=torch.float32)],
    ids=["small", "torch's operators", "float32"],
)
def test_where_nothing_is_chosen_the_cores_stay(stage: _Stage, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    assert settle(stage, Cache(tmp_path)) == torch.get_num_threads() == 2
    assert stage.threads == []


def test_prompts_take_all_cores_and_decoding_what_was_found() -> None:
    counts = ThreadCounts(decoding=3, prompts=2)
    found = []
    for tokens in (1, MOST_ROWS, MOST_ROWS + 1, 512, 1):
        counts.use(tokens)
        found.append(torch.get_num_threads())
    assert found == [3, 3, 2, 2, 3]


def test_a_stage_computes_with_its_own_counts() -> None:
    config = make_config("llama")
    points = [Point(1, 20, 0), Point(1, 1, 20)]
    setting = Setting("cpu", "cpu", "bf16", "nf4", BLOCK_TOKENS, threads=3)
    bench = UnitBench(config, inspect(config), CutRange(False, 0, 1, False), setting, points)
    try:
        (stage,) = bench._stages
        stage.thread_counts = ThreadCounts(decoding=1, prompts=2)
        for point, expected in zip(points, (2, 1), strict=True):
            bench.time([point], 0.0)
            assert bench._worker.call(torch.get_num_threads) == expected
    finally:
        bench.close()


def test_what_is_not_decided_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for decided, expected in ((None, 2), (1, 1)):
        monkeypatch.setattr(thread_count, "fastest", lambda timed, counts, decided=decided: decided)
        assert settle(_Stage(), Cache(tmp_path)) == torch.get_num_threads() == expected


def test_omp_num_threads_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert settle(_Stage(), Cache(tmp_path)) == 2
