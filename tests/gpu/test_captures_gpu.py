"""On a GPU: recording a graph survives garbage, and a recording that failed leaves room for the next."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported, which other tests want interpreted then
    pytest.skip("needs a CUDA device", allow_module_level=True)

from splitrun.stage.card_graph import Captures

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda:0")


@pytest.fixture
def idle_collector() -> Iterator[None]:
    """Garbage is not looked for before somebody sets another threshold."""
    before = gc.get_threshold()
    gc.set_threshold(0)
    yield
    gc.set_threshold(*before)


@pytest.fixture
def total() -> torch.Tensor:
    return torch.zeros(1, device=CARD)


@pytest.fixture(autouse=True)
def own_stream() -> Iterator[None]:
    """As a stage's worker has."""
    with torch.cuda.stream(torch.cuda.Stream(CARD)):
        yield


@pytest.mark.usefixtures("idle_collector")
def test_graphs_of_a_stage_that_is_gone_do_not_spoil_a_recording(total: torch.Tensor) -> None:
    gone = Captures(CARD)
    gone.capture("one", lambda: total.add_(1))
    circle: list[Any] = [gone]
    circle.append(circle)
    calls: list[int] = []

    def launch() -> None:
        calls.append(1)
        if len(calls) == 2:  # while it is recorded
            gc.set_threshold(10, 1, 1)
            assert [[] for _ in range(1000)]
        total.add_(10)

    captures = Captures(CARD)
    del gone, circle
    captures.capture("ten", launch)
    total.zero_()
    captures.run("ten", launch)
    assert total.item() == 10


def test_a_recording_that_failed_leaves_room_for_the_next(total: torch.Tensor) -> None:
    calls: list[int] = []

    def breaks() -> None:
        total.add_(1)
        calls.append(1)
        if len(calls) == 2:
            total.item()  # not permitted while it is recorded

    captures = Captures(CARD)
    captures.capture("first", lambda: total.add_(2))
    with pytest.raises(RuntimeError):
        captures.capture("broken", breaks)
    captures.capture("third", lambda: total.add_(3))
    total.zero_()
    captures.run("first", lambda: None)
    captures.run("third", lambda: None)
    assert total.item() == 5
